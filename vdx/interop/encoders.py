"""Public text and image encoders: their keys, and models from their config.json.

T5: transformers, or the file `models_t5_umt5-xxl-enc-bf16.pth` of the original Wan. CLIP:
transformers, one tower or both in a file, with the prefixes of transformers 4 or without; or
`models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` of the original Wan.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from vdx.config.build import ConfigError, lookup
from vdx.interop.keymap import KEEP, LINEAR, Row, WeightsError, listed, patches
from vdx.interop.stored_array import StoredArray
from vdx.models.encoders.clip import CLIPTextModel, CLIPVisionModel
from vdx.models.encoders.t5 import T5Encoder

__all__ = [
    "clip_names",
    "clip_rows",
    "clip_text_from_config",
    "clip_vision_config",
    "clip_vision_from_config",
    "t5_from_config",
    "t5_rows",
]

# Parts of a T5 layer, ours -> theirs.
_TRANSFORMERS = {
    "norm_a": "layer.0.layer_norm",
    "norm_b": "layer.1.layer_norm",
    "q": "layer.0.SelfAttention.q",
    "k": "layer.0.SelfAttention.k",
    "v": "layer.0.SelfAttention.v",
    "out": "layer.0.SelfAttention.o",
    "distance": "layer.0.SelfAttention.relative_attention_bias",
    "gate_up": "layer.1.DenseReluDense.wi_0",
    "up": "layer.1.DenseReluDense.wi_1",
    "down": "layer.1.DenseReluDense.wo",
}
_WAN = {
    "norm_a": "norm1",
    "norm_b": "norm2",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "out": "attn.o",
    "distance": "pos_embedding.embedding",
    "gate_up": "ffn.gate.0",
    "up": "ffn.fc1",
    "down": "ffn.fc2",
}
_LEAVES = {"norm_a": ("scale", KEEP), "norm_b": ("scale", KEEP), "distance": ("table", KEEP)}


def t5_rows(keys: Collection[str], model: T5Encoder) -> tuple[Row, ...]:
    """The table between the keys of a T5 file, which say its layout, and `model`."""
    if "token_embedding.weight" in keys:
        block, parts = "blocks.{i}", _WAN
        rows = [Row("token_embedding.weight", "words/embedding"), Row("norm.weight", "norm/scale")]
    else:
        # One table under two names; a file has either of them, or both with the same content.
        again = None if "shared.weight" in keys else "words/embedding"
        block, parts = "encoder.block.{i}", _TRANSFORMERS
        rows = [
            Row("shared.weight", "words/embedding"),
            Row("encoder.embed_tokens.weight", again),
            Row("encoder.final_layer_norm.weight", "norm/scale"),
        ]
    for ours, theirs in parts.items():
        leaf, layout = _LEAVES.get(ours, ("kernel", LINEAR))
        if ours == "distance" and model.shared_bias:
            rows.append(Row(f"{block.format(i=0)}.{theirs}.weight", "distance/table"))
        else:
            rows.append(Row(f"{block}.{theirs}.weight", f"layers/{ours}/{leaf}[{{i}}]", layout))
    return tuple(rows)


def _both(source: str, path: str, weight: str, layout=KEEP, index: str = "") -> tuple[Row, ...]:
    return (
        Row(f"{source}.weight", f"{path}/{weight}{index}", layout),
        Row(f"{source}.bias", f"{path}/bias{index}"),
    )


_LAYER = "encoder.layers.{i}"
_CLIP_LAYERS: tuple[Row, ...] = tuple(
    row
    for ours, theirs in {
        "norm_a": "layer_norm1",
        "norm_b": "layer_norm2",
        "attention/q": "self_attn.q_proj",
        "attention/k": "self_attn.k_proj",
        "attention/v": "self_attn.v_proj",
        "attention/out": "self_attn.out_proj",
        "mlp/up": "mlp.fc1",
        "mlp/down": "mlp.fc2",
    }.items()
    for row in _both(
        f"{_LAYER}.{theirs}",
        f"encoder/layers/{ours}",
        *_LEAVES.get(ours, ("kernel", LINEAR)),
        index="[{i}]",
    )
)
_POSITION_IDS = Row("embeddings.position_ids", None)  # the numbers 0, 1, 2, ...
_TEXT = (
    Row("embeddings.token_embedding.weight", "words/embedding"),
    Row("embeddings.position_embedding.weight", "position_table"),
    *_CLIP_LAYERS,
    *_both("final_layer_norm", "norm", "scale"),
    _POSITION_IDS,
)
HEAD_WIDTH = 80  # of the vision model that Wan reads, ViT-H
# Of contrastive training, in files that hold more than one tower needs.
_HEADS = tuple(
    Row(key, None) for key in ("logit_scale", "text_projection.weight", "visual_projection.weight")
)


def _vision(patch: int) -> tuple[Row, ...]:
    return (
        Row("embeddings.class_embedding", "class_table"),
        Row("embeddings.patch_embedding.weight", "patch/kernel", patches((patch, patch))),
        Row("embeddings.position_embedding.weight", "position_table"),
        *_both("pre_layrnorm", "norm_in", "scale"),  # their spelling
        *_CLIP_LAYERS,
        *_both("post_layernorm", "norm", "scale"),
        _POSITION_IDS,
    )


def clip_rows(keys: Collection[str], model: CLIPTextModel | CLIPVisionModel) -> tuple[Row, ...]:
    """The table between the keys of a CLIP file and `model`.

    Not used are the other tower, the heads of contrastive training, and what a vision model
    without `use_last` leaves out.
    """
    mine, other, rows, others = "text_model.", "vision_model.", _TEXT, _vision(1)
    if isinstance(model, CLIPVisionModel):
        mine, other, rows, others = other, mine, _vision(model.patch), _TEXT
        if not model.use_last:
            last = [r.source.replace("{i}", str(model.depth - 1)) for r in _CLIP_LAYERS]
            last += ["post_layernorm.weight", "post_layernorm.bias"]
            rows = (*(Row(key, None) for key in last), *rows)  # the first row decides
    prefix = mine if any(key.startswith(mine) for key in keys) else ""
    return (
        *(dataclasses.replace(row, source=prefix + row.source) for row in rows),
        *(Row(other + row.source, None) for row in others),
        *_HEADS,
    )


# The original Wan's CLIP (wan/modules/clip.py) -> transformers: in layers and outside of them.
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
    """The same arrays by the names of transformers, if they are those of the original Wan's CLIP:
    queries, keys and values, which it stacks in one, are parts of that one. Its text model and
    the heads, which Wan does not read, are left out."""
    if "visual.patch_embedding.weight" not in source:
        return dict(source)
    out = {}
    for key, stored in source.items():
        if key.startswith("textual.") or key in ("log_scale", "visual.head"):
            continue
        if (match := _WAN_KEY.fullmatch(key)) is None:
            out[key] = stored
            continue
        number, layer, leaf = match.groups(default="")
        place = f"vision_model.encoder.layers.{number}." if number else "vision_model."
        size, rest = divmod(math.prod(stored.shape[:1]), 3)
        if layer == "attn.to_qkv" and not rest:
            out |= {
                f"{place}self_attn.{part}_proj{leaf}": stored.rows(i * size, (i + 1) * size)
                for i, part in enumerate("qkv")
            }
        else:
            names = _WAN_LAYERS if number else _WAN_OUTSIDE
            out[place + names.get(layer, layer) + leaf] = stored.squeezed()
    return out


def clip_vision_config(source: Mapping[str, StoredArray]) -> dict[str, Any]:
    """The config.json of transformers for the vision model that Wan reads, from its arrays in
    either layout; they do not tell the width of a head, which is 80, nor the activation.

    Raises WeightsError for other arrays.
    """
    source = clip_names(source)
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in source) else ""
    needed = [
        prefix + key
        for key in (
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers.0.mlp.fc1.weight",
        )
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
    (width, *_, patch), places, up = (source[key].shape for key in needed)
    if width % HEAD_WIDTH:
        raise WeightsError(
            f"The weights of CLIP's vision model are {width} wide, which is no "
            f"number of heads of {HEAD_WIDTH}, as Wan's has: give the folder of "
            "transformers with its config.json."
        )
    depth = next(
        i for i in range(len(source)) if f"{prefix}encoder.layers.{i}.mlp.fc1.weight" not in source
    )
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": up[0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD_WIDTH,
        "patch_size": patch,
        "image_size": math.isqrt(places[0] - 1) * patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _read(config: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """{our field: value} for the names that a config.json must have, ours -> theirs."""
    missing = [theirs for theirs in names.values() if theirs not in config]
    if missing:
        raise ConfigError(
            f"The config.json of a {where} lacks {', '.join(missing)}; it has "
            f"{', '.join(config) or 'nothing'}."
        )
    return {ours: config[theirs] for ours, theirs in names.items()}


def t5_from_config(config: Mapping[str, Any], dtype: str = "float32") -> T5Encoder:
    """The encoder that a config.json of transformers describes.

    Raises ConfigError for another kind of model, for a T5 older than v1.1, whose MLP has no
    gate, and for missing sizes.
    """
    shared = lookup(
        str(config.get("model_type")),
        {"umt5": False, "t5": True},
        "config.json of a T5: model_type",
    )
    mlp = config.get("feed_forward_proj", "relu" if shared else "gated-gelu")
    if mlp != "gated-gelu":
        raise ConfigError(
            f"config.json of a T5: feed_forward_proj = {mlp!r}; only 'gated-gelu' "
            "(T5 v1.1, UMT5) is known here."
        )
    sizes = _read(
        config,
        {
            "vocabulary": "vocab_size",
            "width": "d_model",
            "depth": "num_layers",
            "heads": "num_heads",
            "head_width": "d_kv",
            "hidden": "d_ff",
        },
        "T5",
    )
    return T5Encoder(
        **sizes,
        shared_bias=shared,
        dtype=dtype,
        buckets=config.get("relative_attention_num_buckets", 32),
        farthest=config.get("relative_attention_max_distance", 128),
        eps=config.get("layer_norm_epsilon", 1e-6),
    )


_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


def _clip(config: Mapping[str, Any], tower: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """(the tower's own config, the fields that both towers have); a tower's config may lie
    inside that of the whole model. What is missing there has transformers' default."""
    config = config.get(f"{tower}_config", config)
    kind = config.get("model_type", f"clip_{tower}_model")
    if kind != f"clip_{tower}_model":
        raise ConfigError(f"This config.json is of a {kind!r}, not of a 'clip_{tower}_model'.")
    fields = _read(
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
    return config, fields | {"activation": activation, "eps": config.get("layer_norm_eps", 1e-5)}


def clip_text_from_config(config: Mapping[str, Any], dtype: str = "float32") -> CLIPTextModel:
    """The text model that a config.json of transformers describes; raises ConfigError for
    another kind of model, an unknown activation and missing sizes."""
    config, fields = _clip(config, "text")
    return CLIPTextModel(
        **fields,
        dtype=dtype,
        vocabulary=config.get("vocab_size", 49408),
        positions=config.get("max_position_embeddings", 77),
        eos=config.get("eos_token_id", 49407),
    )


def clip_vision_from_config(
    config: Mapping[str, Any], dtype: str = "float32", use_last: bool = True
) -> CLIPVisionModel:
    """As `clip_text_from_config`; use_last: see CLIPVisionModel."""
    config, fields = _clip(config, "vision")
    image, patch = config.get("image_size", 224), config.get("patch_size", 32)
    if (
        not isinstance(image, int)
        or not isinstance(patch, int)
        or image % patch
        or (config.get("num_channels", 3) != 3)
    ):
        raise ConfigError(
            f"config.json of a CLIP: image_size = {image}, patch_size = {patch}, "
            f"num_channels = {config.get('num_channels', 3)}; expected a whole "
            "number of square patches and 3 channels."
        )
    return CLIPVisionModel(**fields, dtype=dtype, image=image, patch=patch, use_last=use_last)
