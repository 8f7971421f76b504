"""Folders of the original Wan, and single files, as a PretrainedModel.

A single file, such as ComfyUI's, has the transformer; the other parts are given.

They have few configs. The others are known, or follow from the shapes of the arrays. Parts are
found by their names: `high_noise_model` and `low_noise_model`, or
`diffusion_pytorch_model*.safetensors`; `models_t5_*.pth`; `models_clip_*.pth`; `Wan2.?_VAE.pth`;
`google/umt5-xxl`.
References: the configs in wan/configs of Wan-Video/Wan2.1 and Wan2.2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vdx.files import read_json_object
from vdx.interop.clip import clip_vision_config
from vdx.interop.components import Component, open_component
from vdx.interop.family_defaults import WIDTH_1P3B
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.load import open_weights
from vdx.interop.pretrained import (
    DEFAULTS,
    OFFICIAL,
    VACE,
    PretrainedModel,
    check_consistency,
)
from vdx.interop.stored_array import StoredArray
from vdx.interop.video_vae import VIDEO_VAES

# Part -> patterns of its path in the folder.
LOCATIONS = {
    "transformer": ("high_noise_model", "diffusion_pytorch_model*.safetensors"),
    "transformer_2": ("low_noise_model",),
    "text_encoder": ("models_t5_*.pth",),
    "tokenizer": ("google/umt5-xxl",),
    "vae": ("Wan2.?_VAE.pth",),
    "image_encoder": ("models_clip_*.pth",),
}
REQUIRED = ("transformer", "text_encoder", "tokenizer", "vae")
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "lower_order_final": True,
    "disable_corrector": [],
}
# The makers' values. Noise levels from which on the first of two experts is evaluated:
BOUNDARY_TEXT = 0.875  # T2V A14B
BOUNDARY_IMAGE = 0.9  # I2V A14B
# Shifts of the noise levels:
SHIFT_EXPERTS = 12.0  # T2V A14B
SHIFT_FLF_VACE = 16.0  # FLF2V (a first and a last frame) and VACE
SHIFT_1P3B = 8.0  # T2V 1.3B; the README recommends 8 to 12
SHIFT = 5.0  # the other models; I2V at 480p has another, see family_defaults
# Latent channels -> row of VIDEO_VAES.
VAES = {16: "wan2.1", 48: "wan2.2"}


def open_original(
    path: str | Path, given: Mapping[str, str | Path], dtype: str = "float32"
) -> PretrainedModel:
    """Open the model whose transformer is in `path`, a folder or a file.

    Reads headers only. given: where other parts are, by the names of LOCATIONS, if not in the
    folder. Raises WeightsError that lists the missing parts, or as `open_pretrained` does.
    """
    path = Path(path)
    locations = _locate(path, given)

    # The networks, each with the config that its files lack.
    tokenizer = locations.pop("tokenizer")
    components = {
        part: open_component(part, location, dtype, _missing_config(part, location))
        for part, location in locations.items()
    }

    # The index and the scheduler that diffusers would have.
    index = _index(components, tokenizer)
    model = PretrainedModel(
        path=path,
        dtype=dtype,
        index=index,
        scheduler=UNIPC | {"flow_shift": _shift(components)},
        tokenizer=tokenizer,
        components=components,
    )
    check_consistency(model)
    return model


def open_part(part: str, path: Path) -> Component | None:
    """Open a part that is in a folder of the original Wan; None if it is not there."""
    found = _find(part, path)
    if found is None:
        return None
    return open_component(part, found, "float32", _missing_config(part, found))


def _locate(path: Path, given: Mapping[str, str | Path]) -> dict[str, Path]:
    """Return where each part is. Raises WeightsError that lists the missing ones."""
    locations = {}
    for part in LOCATIONS:
        found = _find(part, path)
        if found is not None:
            locations[part] = found
    # Parts that are given take precedence.
    locations |= {part: Path(location) for part, location in given.items()}

    missing = [
        f"{part}: {' or '.join(LOCATIONS[part])} (--{part}=...)"
        for part in REQUIRED
        if part not in locations
    ]
    missing += [
        f"{part}: {location} is not there"
        for part, location in locations.items()
        if not location.exists()
    ]

    if missing:
        head = (
            f"{path} is neither a folder of diffusers nor one of the original Wan's with all its "
            "parts. It lacks:"
        )
        raise WeightsError(listed(head, missing))
    return locations


def _find(part: str, path: Path) -> Path | None:
    """Return where a part is in `path`, None if it is not there.

    A transformer whose files are in the folder itself is in that folder.
    """
    if path.is_file():
        return path if part == "transformer" else None
    for pattern in LOCATIONS[part]:
        for found in sorted(path.glob(pattern)):
            if part == "transformer" and found.is_file():
                return path
            return found
    return None


def _index(components: Mapping[str, Component], tokenizer: Path) -> dict[str, Any]:
    """Return the `model_index.json` that diffusers has for these networks."""
    first = components["transformer"]
    signals = first.module.signals
    control = "control" in signals
    image = "concat" in signals
    experts = "transformer_2" in components

    pipeline = "WanImageToVideoPipeline" if image else "WanPipeline"
    boundary = None
    if experts:
        boundary = BOUNDARY_IMAGE if image else BOUNDARY_TEXT
    index: dict[str, Any] = {
        "_class_name": VACE if control else pipeline,
        DEFAULTS: OFFICIAL,
        "boundary_ratio": boundary,
        "scheduler": ["diffusers", UNIPC["_class_name"]],
        "tokenizer": ["transformers", _tokenizer_class(tokenizer)],
    }
    if not control:
        index["expand_timesteps"] = VAES.get(components["vae"].module.z_dim) == "wan2.2"

    # The class of each part that such a pipeline may have.
    transformer_class = ["diffusers", first.config["_class_name"]]
    classes = {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if image:
        classes["image_encoder"] = ["transformers", "CLIPVisionModel"]
    classes |= {"transformer": transformer_class, "transformer_2": transformer_class}
    if image:
        classes["image_processor"] = ["transformers", "CLIPImageProcessor"]

    # Parts that this model does not have are nulls.
    parts = set(components)
    if "image_encoder" in components:
        parts.add("image_processor")
    index |= {part: [None, None] for part in classes}
    index |= {part: class_name for part, class_name in classes.items() if part in parts}
    return index


def _shift(components: Mapping[str, Component]) -> float:
    """Return the makers' shift for these networks."""
    signals = components["transformer"].module.signals
    if "transformer_2" in components and "concat" not in signals:
        return SHIFT_EXPERTS
    first_and_last = signals.get("image_tokens", {}).get("positions")
    if first_and_last or "control" in signals:
        return SHIFT_FLF_VACE
    width = components["transformer"].module.backbone_config["width"]
    if width == WIDTH_1P3B and "concat" not in signals:
        return SHIFT_1P3B
    return SHIFT


def _tokenizer_class(folder: Path) -> str:
    """Return the class with which diffusers reads the tokenizer."""
    config_file = folder / "tokenizer_config.json"
    name = "T5"
    if config_file.exists():
        # A tokenizer of texts of any length has model_max_length = int(1e30).
        config = read_json_object(config_file, wide=True)
        name = str(config.get("tokenizer_class", name))
    if name.startswith("T5"):
        return "T5TokenizerFast"
    return name


def _missing_config(part: str, location: Path) -> dict[str, Any] | None:
    """Return the config of a part whose files have none and need one, else None."""
    if part.startswith("transformer") or (location / "config.json").exists():
        return None
    known = {"text_encoder": umt5_config, "image_encoder": clip_vision_config, "vae": vae_config}
    if part not in known:
        return None
    return known[part](open_weights(location))


class _T5Keys(NamedTuple):
    """Keys whose shapes give the sizes of a UMT5, in one of its layouts.

    {} stands for the number of a layer.
    """

    words: str
    query: str
    up: str
    distance: str


_T5_LAYOUTS = (
    _T5Keys(
        words="token_embedding.weight",
        query="blocks.{}.attn.q.weight",
        up="blocks.{}.ffn.fc1.weight",
        distance="blocks.0.pos_embedding.embedding.weight",
    ),
    _T5Keys(
        words="shared.weight",
        query="encoder.block.{}.layer.0.SelfAttention.q.weight",
        up="encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
        distance="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
)


class _VaeKeys(NamedTuple):
    """Keys whose shapes give the sizes of a VAE, in one of its layouts."""

    latent: str
    encoder: str
    decoder: str


_VAE_LAYOUTS = (
    _VaeKeys(
        latent="conv2.weight",
        encoder="encoder.conv1.weight",
        decoder="decoder.head.0.gamma",
    ),
    _VaeKeys(
        latent="post_quant_conv.weight",
        encoder="encoder.conv_in.weight",
        decoder="decoder.norm_out.gamma",
    ),
)


def umt5_config(source: Mapping[str, StoredArray]) -> dict[str, Any]:
    """Return the config.json of transformers for the arrays of a UMT5.

    They may have the layout of transformers or the original's. Raises WeightsError for other
    arrays.
    """
    fitting = [keys for keys in _T5_LAYOUTS if keys.words in source and keys.distance in source]
    if not fitting:
        raise WeightsError(_other_weights("a UMT5 encoder", source))

    # The sizes, from the shapes of a few arrays.
    keys = fitting[0]
    vocabulary, width = source[keys.words].shape
    buckets, heads = source[keys.distance].shape
    depth = next(i for i in range(len(source)) if keys.query.format(i) not in source)
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": source[keys.query.format(0)].shape[0] // heads,
        "d_ff": source[keys.up.format(0)].shape[0],
        "num_layers": depth,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }


def vae_config(source: Mapping[str, StoredArray]) -> dict[str, Any]:
    """Return the config.json of diffusers for the arrays of a Wan VAE.

    They may have the layout of diffusers or the original's. The number of latent channels
    distinguishes Wan 2.1 and 2.2; the widths may be others. Raises WeightsError for other arrays.
    """
    fitting = [keys for keys in _VAE_LAYOUTS if all(key in source for key in keys)]
    release = VAES.get(source[fitting[0].latent].shape[0]) if fitting else None
    if release is None:
        raise WeightsError(_other_weights("Wan's VAE", source))

    keys = fitting[0]
    return {
        "_class_name": "AutoencoderKLWan",
        **VIDEO_VAES[release],
        "base_dim": source[keys.encoder].shape[0],
        "decoder_base_dim": source[keys.decoder].shape[0],
    }


def _other_weights(name: str, source: Mapping[str, StoredArray]) -> str:
    """Return the message for arrays that are not those of a network."""
    first = ", ".join(list(source)[:3])
    return f"These are not the weights of {name}; they begin with {first}."
