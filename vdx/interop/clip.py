"""Pretrained CLIP encoders: their keys, and models from their config.json.

Files are those of transformers, one tower or both in a file, with the prefixes of transformers 4
or without; or `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` of the original Wan.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from vdx.config.build import ConfigError, lookup
from vdx.config.ranges import Index, OneOf, PositiveFraction
from vdx.interop.config_ranges import Channels, Heads, Layers, Pixels, Places, Vocabulary
from vdx.interop.keymap import KEEP, LINEAR, Layout, Row, WeightsError, listed, patches
from vdx.interop.stored_array import StoredArray
from vdx.interop.t5 import config_fields
from vdx.models.encoders.clip import CLIPTextModel, CLIPVisionModel

__all__ = [
    "FIELDS",
    "clip_names",
    "clip_rows",
    "clip_text_from_config",
    "clip_vision_config",
    "clip_vision_from_config",
]

HEAD_WIDTH = 80  # of the vision model that Wan reads, ViT-H


# Tables of keys


def _pair(
    source: str, path: str, weight: str, layout: Layout = KEEP, index: str = ""
) -> tuple[Row, Row]:
    """Return the rows of a weight and its bias."""
    return (
        Row(f"{source}.weight", f"{path}/{weight}{index}", layout),
        Row(f"{source}.bias", f"{path}/bias{index}"),
    )


# Parts of a layer, ours -> theirs.
_NORMS = {"norm_a": "layer_norm1", "norm_b": "layer_norm2"}
_DENSE = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}


def _layer_rows() -> Iterator[Row]:
    """Yield the rows of the stacked layers, the same in both towers."""
    for ours, theirs in _NORMS.items():
        source = f"encoder.layers.{{i}}.{theirs}"
        yield from _pair(source, f"encoder/layers/{ours}", "scale", KEEP, "[{i}]")
    for ours, theirs in _DENSE.items():
        source = f"encoder.layers.{{i}}.{theirs}"
        yield from _pair(source, f"encoder/layers/{ours}", "kernel", LINEAR, "[{i}]")


_LAYERS: tuple[Row, ...] = tuple(_layer_rows())
_POSITION_IDS = Row("embeddings.position_ids", None)  # the numbers 0, 1, 2, ...
_TEXT: tuple[Row, ...] = (
    Row("embeddings.token_embedding.weight", "words/embedding"),
    Row("embeddings.position_embedding.weight", "position_table"),
    *_LAYERS,
    *_pair("final_layer_norm", "norm", "scale"),
    _POSITION_IDS,
)
# Heads of contrastive training, in files that hold more than one tower needs.
_HEADS: tuple[Row, ...] = (
    Row("logit_scale", None),
    Row("text_projection.weight", None),
    Row("visual_projection.weight", None),
)


def _vision(patch: int) -> tuple[Row, ...]:
    return (
        Row("embeddings.class_embedding", "class_table"),
        Row("embeddings.patch_embedding.weight", "patch/kernel", patches((patch, patch))),
        Row("embeddings.position_embedding.weight", "position_table"),
        *_pair("pre_layrnorm", "norm_in", "scale"),  # their spelling
        *_LAYERS,
        *_pair("post_layernorm", "norm", "scale"),
        _POSITION_IDS,
    )


def clip_rows(keys: Collection[str], model: CLIPTextModel | CLIPVisionModel) -> tuple[Row, ...]:
    """Return the table between the keys of a CLIP file and `model`.

    Keys that are not used: the other tower, the heads of contrastive training, and the parts that
    a vision model without `use_last` leaves out.
    """
    # The tower of the model, and the other one.
    if isinstance(model, CLIPVisionModel):
        prefix = "vision_model."
        rows = _vision(model.patch)
        other_prefix = "text_model."
        other_rows = _TEXT
        if not model.use_last:
            rows = (*_unused_last_layer(model.depth - 1), *rows)  # the first row decides
    else:
        prefix = "text_model."
        rows = _TEXT
        other_prefix = "vision_model."
        other_rows = _vision(1)

    # Files of one tower may have no prefix.
    if not any(key.startswith(prefix) for key in keys):
        prefix = ""
    return (
        *(dataclasses.replace(row, source=prefix + row.source) for row in rows),
        *(Row(other_prefix + row.source, None) for row in other_rows),
        *_HEADS,
    )


def _unused_last_layer(layer: int) -> Iterator[Row]:
    """Yield rows that skip the keys of one layer and of the norm after it."""
    for row in _LAYERS:
        yield Row(row.source.replace("{i}", str(layer)), None)
    yield Row("post_layernorm.weight", None)
    yield Row("post_layernorm.bias", None)


# The original Wan's file (wan/modules/clip.py) -> transformers: in layers and outside of them.
_WAN_LAYERS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_WAN_OUTSIDE = {
    "patch_embedding": "embeddings.patch_embedding",
    "cls_embedding": "embeddings.class_embedding",
    "pre_norm": "pre_layrnorm",
    "pos_embedding": "embeddings.position_embedding.weight",
    "post_norm": "post_layernorm",
}
_WAN_KEY = re.compile(r"visual\.(?:transformer\.(\d+)\.)?(.+?)(\.weight|\.bias)?")


def clip_names(source: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """Rename the arrays of the original Wan's CLIP as transformers does.

    Other files stay as they are. Wan stacks queries, keys and values in one array: here they are
    parts of it. Its text model and the heads, which Wan does not read, are left out.
    """
    if "visual.patch_embedding.weight" not in source:
        return dict(source)

    renamed: dict[str, StoredArray] = {}
    for key, stored in source.items():
        if key.startswith("textual.") or key in ("log_scale", "visual.head"):
            continue
        match = _WAN_KEY.fullmatch(key)
        if match is None:
            renamed[key] = stored
            continue

        # Where it is, by the names of transformers.
        number, layer, leaf = match.groups(default="")
        prefix = f"vision_model.encoder.layers.{number}." if number else "vision_model."

        # Three equal parts of the first axis are queries, keys, values.
        size, rest = divmod(math.prod(stored.shape[:1]), 3)
        if layer == "attn.to_qkv" and not rest:
            for i, part in enumerate("qkv"):
                rows = stored.rows(i * size, (i + 1) * size)
                renamed[f"{prefix}self_attn.{part}_proj{leaf}"] = rows
        else:
            names = _WAN_LAYERS if number else _WAN_OUTSIDE
            renamed[prefix + names.get(layer, layer) + leaf] = stored.squeezed()
    return renamed


# Configs


class _VisionSizes(NamedTuple):
    """Shapes of arrays that decide the sizes of a vision model."""

    patch_kernel: tuple[int, ...]  # [width 3 patch patch]
    positions: tuple[int, ...]  # [1 + patches width]
    up: tuple[int, ...]  # [hidden width], of the first MLP
    depth: int  # layers in the file


def _vision_sizes(source: Mapping[str, StoredArray]) -> _VisionSizes:
    """Look up the sizes, by the names of transformers.

    Raises WeightsError for other arrays.
    """
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in source) else ""
    needed = [
        f"{prefix}embeddings.patch_embedding.weight",
        f"{prefix}embeddings.position_embedding.weight",
        f"{prefix}encoder.layers.0.mlp.fc1.weight",
    ]
    missing = [key for key in needed if key not in source or len(source[key].shape) < 2]
    if missing:
        raise WeightsError(
            listed(
                "These are not the weights of CLIP's vision model. They begin "
                f"with {', '.join(list(source)[:3])} and lack:",
                missing,
            )
        )

    depth = 0
    while f"{prefix}encoder.layers.{depth}.mlp.fc1.weight" in source:
        depth += 1
    patch_kernel, positions, up = (source[key].shape for key in needed)
    return _VisionSizes(patch_kernel, positions, up, depth)


def clip_vision_config(source: Mapping[str, StoredArray]) -> dict[str, Any]:
    """Derive the config.json of the vision model that Wan reads, from its arrays.

    The arrays are in either layout. They do not determine the width of a head, which is 80, nor
    the activation. Raises WeightsError for other arrays.
    """
    sizes = _vision_sizes(clip_names(source))
    width = sizes.patch_kernel[0]
    patch = sizes.patch_kernel[-1]
    patches_in_image = sizes.positions[0] - 1  # the first position is the class token's
    if width % HEAD_WIDTH:
        raise WeightsError(
            f"The weights of CLIP's vision model are {width} wide, which is no "
            f"number of heads of {HEAD_WIDTH}, as Wan's has: give the folder of "
            "transformers with its config.json."
        )
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": sizes.up[0],
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": width // HEAD_WIDTH,
        "patch_size": patch,
        "image_size": math.isqrt(patches_in_image) * patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


# The names of transformers -> rows of ACTIVATIONS.
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


# Fields of a config.json that are read: of a tower, and of the model around both.
TOWER_FIELDS = {
    "model_type": str,
    "hidden_size": Channels,
    "num_hidden_layers": Layers,
    "num_attention_heads": Heads,
    "intermediate_size": Channels,
    "hidden_act": Annotated[str, OneOf(lambda: _ACTIVATIONS)],
    "layer_norm_eps": PositiveFraction,
    "vocab_size": Vocabulary,
    "max_position_embeddings": Places,
    "eos_token_id": Index,
    "image_size": Pixels,
    "patch_size": Pixels,
    "num_channels": Channels,
}
FIELDS = {**TOWER_FIELDS, "text_config": TOWER_FIELDS, "vision_config": TOWER_FIELDS}


def _tower_config(config: Mapping[str, Any], tower: str) -> Mapping[str, Any]:
    """Return a tower's own config, which may be inside that of the whole model.

    Raises ConfigError for another kind of model.
    """
    config = config.get(f"{tower}_config", config)
    kind = config.get("model_type", f"clip_{tower}_model")
    if kind != f"clip_{tower}_model":
        raise ConfigError(f"This config.json is of a {kind!r}, not of a 'clip_{tower}_model'.")
    return config


def _shared_fields(config: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """Return the fields that both towers have.

    Missing ones have transformers' default.
    """
    fields = config_fields(
        config,
        {
            "width": "hidden_size",
            "depth": "num_hidden_layers",
            "heads": "num_attention_heads",
            "hidden": "intermediate_size",
        },
        f"CLIP {tower} model",
    )

    if fields["width"] % fields["heads"]:
        raise ConfigError(
            f"config.json of a CLIP: hidden_size = {fields['width']} does not "
            f"divide into {fields['heads']} heads."
        )

    activation = lookup(
        config.get("hidden_act", "quick_gelu"), _ACTIVATIONS, "config.json of a CLIP: hidden_act"
    )
    return fields | {"activation": activation, "eps": config.get("layer_norm_eps", 1e-5)}


def clip_text_from_config(config: Mapping[str, Any], dtype: str = "float32") -> CLIPTextModel:
    """Build the text model that a config.json of transformers describes.

    Raises ConfigError for another kind of model, an unknown activation and missing sizes.
    """
    config = _tower_config(config, "text")
    return CLIPTextModel(
        **_shared_fields(config, "text"),
        dtype=dtype,
        vocabulary=config.get("vocab_size", 49408),
        positions=config.get("max_position_embeddings", 77),
        eos=config.get("eos_token_id", 49407),
    )


def clip_vision_from_config(
    config: Mapping[str, Any], dtype: str = "float32", use_last: bool = True
) -> CLIPVisionModel:
    """Build the vision model that a config.json of transformers describes.

    use_last: see CLIPVisionModel. Raises ConfigError as `clip_text_from_config`, and for images
    that are no whole number of patches.
    """
    config = _tower_config(config, "vision")
    fields = _shared_fields(config, "vision")
    image = config.get("image_size", 224)
    patch = config.get("patch_size", 32)
    channels = config.get("num_channels", 3)
    numbers = isinstance(image, int) and isinstance(patch, int)
    if not numbers or image % patch or channels != 3:
        raise ConfigError(
            f"config.json of a CLIP: image_size = {image}, patch_size = {patch}, "
            f"num_channels = {channels}; expected a whole "
            "number of square patches and 3 channels."
        )
    return CLIPVisionModel(**fields, dtype=dtype, image=image, patch=patch, use_last=use_last)
