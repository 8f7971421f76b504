"""Weights and configs of Stable Diffusion's image autoencoders.

Also the rows of the layers that they share with the U-Nets and with the video autoencoders.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vdx.config.build import ConfigError, fill
from vdx.config.ranges import Finite, LevelBlocks, Positive
from vdx.interop.config_ranges import Channels, Levels
from vdx.interop.keymap import CONV, KEEP, LINEAR, Layout, Row, patches
from vdx.models.vae.image_vae import ImageVAE

# Our name of a matrix of attention -> its names in diffusers; most files have the older one.
ATTENTION_NAMES = {
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "out": ("to_out.0", "proj_attn"),
}

# Keys of a config -> the only value that ImageVAE has.
SUPPORTED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}

# Fields of a config that are read.
FIELDS: dict[str, Any] = {
    "block_out_channels": Levels,
    "layers_per_block": LevelBlocks,
    "latent_channels": Channels,
    "norm_num_groups": Channels,
    "in_channels": Channels,
    "out_channels": Channels,
    "scaling_factor": Positive,
    "shift_factor": Finite | None,
}


def dense_rows(theirs: str, ours: str, layout: Layout) -> Iterator[Row]:
    """Yield the rows of a kernel and its bias."""
    yield Row(f"{theirs}.weight", f"{ours}/kernel", layout)
    yield Row(f"{theirs}.bias", f"{ours}/bias")


def norm_rows(theirs: str, ours: str) -> Iterator[Row]:
    """Yield the rows of a norm over groups."""
    yield Row(f"{theirs}.weight", f"{ours}/norm/scale", KEEP)
    yield Row(f"{theirs}.bias", f"{ours}/norm/bias", KEEP)


def residual_rows(theirs: str, ours: str) -> Iterator[Row]:
    """Yield the rows of an ImageResidual, `ResnetBlock2D` in diffusers."""
    for i in (1, 2):
        yield from norm_rows(f"{theirs}.norm{i}", f"{ours}/norm{i}")
        yield from dense_rows(f"{theirs}.conv{i}", f"{ours}/conv{i}", CONV)
    yield from dense_rows(f"{theirs}.conv_shortcut", f"{ours}/shortcut", patches((1, 1)))
    yield from dense_rows(f"{theirs}.time_emb_proj", f"{ours}/emb", LINEAR)


def image_vae_rows() -> tuple[Row, ...]:
    """Return the table between the keys of `AutoencoderKL` and our parameters.

    It is the same for all configurations.
    """
    rows = [
        *dense_rows("quant_conv", "quant_conv", patches((1, 1))),
        *dense_rows("post_quant_conv", "post_quant_conv", patches((1, 1))),
    ]
    for coder, way in (("encoder", "down"), ("decoder", "up")):
        rows += _coder_rows(coder, way)
    return tuple(rows)


def _coder_rows(coder: str, way: str) -> Iterator[Row]:
    """Yield the rows of the encoder ("down") or of the decoder ("up")."""
    yield from dense_rows(f"{coder}.conv_in", f"{coder}/conv_in", CONV)
    yield from dense_rows(f"{coder}.conv_out", f"{coder}/conv_out", CONV)
    yield from norm_rows(f"{coder}.conv_norm_out", f"{coder}/norm_out")

    level = f"{coder}.{way}_blocks.{{i}}"
    yield from residual_rows(f"{level}.resnets.{{j}}", f"{coder}/level_{{i}}_res_{{j}}")
    yield from dense_rows(f"{level}.{way}samplers.0.conv", f"{coder}/level_{{i}}_resample", CONV)

    middle = f"{coder}.mid_block"
    yield from residual_rows(f"{middle}.resnets.{{j}}", f"{coder}/middle_res_{{j}}")
    theirs = f"{middle}.attentions.{{j}}"
    ours = f"{coder}/middle_attention_{{j}}"
    yield from norm_rows(f"{theirs}.group_norm", f"{ours}/norm")
    for name, their_names in ATTENTION_NAMES.items():
        for their_name in their_names:
            yield from dense_rows(f"{theirs}.{their_name}", f"{ours}/{name}", LINEAR)


def image_vae_from_config(config: Mapping[str, Any], dtype: str = "float32") -> ImageVAE:
    """Build the VAE that a diffusers `config.json` describes.

    Raises ConfigError for another class, unknown keys, and parts that ImageVAE does not have.
    """
    fields = fields_of_class(config, "AutoencoderKL")
    for key in ("sample_size", "force_upcast"):  # how it is run, no part of the network
        fields.pop(key, None)
    for key, only in SUPPORTED.items():
        value = fields.pop(key, only)
        values = value if isinstance(value, list | tuple) else [value]
        if not set(values) <= {only}:
            raise ConfigError(f"vae.{key} = {value!r} is not supported, only {only!r}.")

    # The reference's defaults, which are smaller than any pretrained VAE.
    fields = {"block_out_channels": (64,), "layers_per_block": 1, **fields}
    return fill(ImageVAE, fields, "vae", dtype=dtype)


def fields_of_class(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a config without notes such as `_diffusers_version`.

    Raises ConfigError for a config of another class than `name`.
    """
    if config.get("_class_name", name) != name:
        raise ConfigError(
            f"This config is of {config['_class_name']}, expected {name}: give the "
            "config.json of the folder `vae`."
        )
    return {key: value for key, value in config.items() if not key.startswith("_")}
