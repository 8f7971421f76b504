"""Weights and configs of the pretrained video autoencoders, Wan 2.1 and 2.2.

There are two layouts: that of diffusers (`vae/diffusion_pytorch_model.safetensors` with a
`config.json`) and the original (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, and files made from them),
which comes without a config: VIDEO_VAES has them.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vdx.config.build import ConfigError, configurable_fields, fill
from vdx.interop.config_ranges import Pixels
from vdx.interop.image_vae import dense_rows, fields_of_class
from vdx.interop.keymap import CONV, Layout, Row, patches
from vdx.models.vae.video_vae import VideoVAE

# Configs of the pretrained VAEs, for files that come without one. "wan2.1" has the default fields.
# The statistics of the latents, one number per channel, are those of the Wan team's code.
# fmt: off
VIDEO_VAES: dict[str, dict[str, Any]] = {
    "wan2.1": {
        "latents_mean": (
            -0.7571, -0.7089, -0.9113,  0.1075, -0.1745,  0.9653, -0.1517,  1.5508,
             0.4134, -0.0715,  0.5517, -0.3632, -0.1922, -0.9497,  0.2503, -0.2921,
        ),
        "latents_std": (
             2.8184,  1.4541,  2.3275,  2.6558,  1.2196,  1.7708,  2.6052,  2.0743,
             3.2687,  2.1526,  2.8652,  1.5579,  1.6382,  1.1253,  2.8251,  1.9160,
        ),
    },
    "wan2.2": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "latents_mean": (
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799,  0.0174,  0.1838,  0.1557,
            -0.1382,  0.0542,  0.2813,  0.0891,  0.1570, -0.0098,  0.0375, -0.1825,
            -0.2246, -0.1207, -0.0698,  0.5109,  0.2665, -0.2108, -0.2158,  0.2502,
            -0.2055, -0.0322,  0.1109,  0.1567, -0.0729,  0.0899, -0.2799, -0.1230,
            -0.0313, -0.1649,  0.0117,  0.0723, -0.2839, -0.2083, -0.0520,  0.3748,
             0.0152,  0.1957,  0.1433, -0.2944,  0.3573, -0.0548, -0.1681, -0.0667,
        ),
        "latents_std": (
             0.4765,  1.0364,  0.4514,  1.1677,  0.5313,  0.4990,  0.4818,  0.5013,
             0.8158,  1.0344,  0.5894,  1.0901,  0.6885,  0.6165,  0.8454,  0.4978,
             0.5759,  0.3523,  0.7135,  0.6804,  0.5833,  1.4146,  0.8986,  0.5659,
             0.7069,  0.5338,  0.4889,  0.4917,  0.4069,  0.4999,  0.6866,  0.4093,
             0.5709,  0.6065,  0.6415,  0.4944,  0.5726,  1.2042,  0.5458,  1.6887,
             0.3971,  1.0600,  0.3943,  0.5537,  0.5444,  0.4089,  0.7468,  0.7744,
        ),
    },
}
# fmt: on


# Fields of a config.json that are read.
FIELDS = {
    **configurable_fields(VideoVAE),
    "scale_factor_temporal": Pixels | None,
    "scale_factor_spatial": Pixels | None,
}


class Names(NamedTuple):
    """The names of one part in the two layouts."""

    diffusers: str
    original: str

    def of(self, original: bool) -> str:
        """Return the name in one of them."""
        return self.original if original else self.diffusers


# Our name of a part -> its names in both layouts. Parts of a residual block:
RESIDUAL = {
    "norm1": Names("norm1", "residual.0"),
    "conv1": Names("conv1", "residual.2"),
    "norm2": Names("norm2", "residual.3"),
    "conv2": Names("conv2", "residual.6"),
    "shortcut": Names("conv_shortcut", "shortcut"),
}
# Parts of the encoder and of the decoder:
CODER = {
    "conv_in": Names("conv_in", "conv1"),
    "norm_out": Names("norm_out", "head.0"),
    "conv_out": Names("conv_out", "head.2"),
    "middle/res_0": Names("mid_block.resnets.0", "middle.0"),
    "middle/attention_0": Names("mid_block.attentions.0", "middle.1"),
    "middle/res_1": Names("mid_block.resnets.1", "middle.2"),
}
WAYS = {"encoder": "down", "decoder": "up"}
# The layers around the latents:
LATENT = {
    "quant_conv": Names("quant_conv", "conv1"),
    "post_quant_conv": Names("post_quant_conv", "conv2"),
}


def video_vae_rows(vae: VideoVAE, original: bool = False) -> tuple[Row, ...]:
    """Return the keys of `AutoencoderKLWan` in diffusers, or of the Wan team's files.

    original: the latter.
    """
    rows: list[Row] = []
    for ours, names in LATENT.items():
        rows += _layer_rows(names.of(original), ours, original)
    for coder in ("encoder", "decoder"):
        layers = [(names.of(original), ours) for ours, names in CODER.items()]
        if original:
            layers += _original_levels(vae, coder)
        else:
            layers += _diffusers_levels(vae, coder)
        for theirs, ours in layers:
            rows += _layer_rows(f"{coder}.{theirs}", f"{coder}/{ours}", original)
    return tuple(rows)


def _layer_rows(theirs: str, ours: str, original: bool) -> Iterator[Row]:
    """Yield the rows of one layer, whose kind follows from our name."""
    kind = ours.rsplit("/")[-1]
    if kind.startswith("res_"):
        for part, names in RESIDUAL.items():
            yield from _layer_rows(f"{theirs}.{names.of(original)}", f"{ours}/{part}", original)
    elif kind.startswith("attention_"):
        yield Row(f"{theirs}.norm.gamma", f"{ours}/norm/scale", _gamma(2))
        yield from dense_rows(f"{theirs}.to_qkv", f"{ours}/qkv", patches((1, 1)))
        yield from dense_rows(f"{theirs}.proj", f"{ours}/out", patches((1, 1)))
    elif kind in ("downsample", "upsample"):
        yield from dense_rows(f"{theirs}.resample.1", f"{ours}/conv", CONV)
        yield from dense_rows(f"{theirs}.time_conv", f"{ours}/time_conv", CONV)
    elif kind.startswith("norm"):
        yield Row(f"{theirs}.gamma", f"{ours}/scale", _gamma(3))
    elif kind in ("shortcut", "quant_conv", "post_quant_conv"):  # 1x1x1: our dense layers
        yield from dense_rows(theirs, ours, patches((1, 1, 1)))
    else:
        yield from dense_rows(theirs, ours, CONV)


def _gamma(axes: int) -> Layout:
    """Return the layout of a norm's scale.

    Wan stores it with `axes` trailing axes of size 1.
    """
    return Layout(lambda x: x.reshape(-1), lambda x: x.reshape(-1, *[1] * axes))


def _level_layers(vae: VideoVAE, coder: str) -> list[list[str]]:
    """Return our names of the layers in each level."""
    up = coder == "decoder"
    blocks = vae.num_res_blocks + up
    last = len(vae.dim_mult) - 1
    levels = []
    for i in range(last + 1):
        names = []
        for j in range(blocks):
            names.append(f"res_{j}")
            if not up and 2.0**-i in vae.attn_scales:
                names.append(f"attention_{j}")
        if i < last:
            names.append(f"{WAYS[coder]}sample")
        levels.append(names)
    return levels


def _original_levels(vae: VideoVAE, coder: str) -> Iterator[tuple[str, str]]:
    """Yield (the Wan team's name, our name) of the layers of the levels.

    Both lack `encoder.` or `decoder.`.
    """
    way = WAYS[coder]
    count = 0  # Wan 2.1 numbers the layers of all levels in one list
    for i, names in enumerate(_level_layers(vae, coder)):
        for k, name in enumerate(names):
            theirs = f"{i}.{way}samples.{k}" if vae.is_residual else str(count)
            yield f"{way}samples.{theirs}", f"{way}_{i}/{name}"
            count += 1


def _diffusers_levels(vae: VideoVAE, coder: str) -> Iterator[tuple[str, str]]:
    """Yield (diffusers' name, our name) of the layers of the levels.

    Both lack `encoder.` or `decoder.`.
    """
    way = WAYS[coder]
    in_one_list = coder == "encoder" and not vae.is_residual
    sampler = f"{way}sampler" if vae.is_residual else f"{way}samplers.0"
    count = 0
    for i, names in enumerate(_level_layers(vae, coder)):
        for k, name in enumerate(names):
            if in_one_list:
                theirs = f"{way}_blocks.{count}"
            elif name.endswith("sample"):
                theirs = f"{way}_blocks.{i}.{sampler}"
            else:
                theirs = f"{way}_blocks.{i}.resnets.{k}"
            yield theirs, f"{way}_{i}/{name}"
            count += 1


def video_vae_from_config(config: Mapping[str, Any], dtype: str = "float32") -> VideoVAE:
    """Build the VAE that a diffusers `config.json` describes.

    Raises ConfigError for another class, unknown keys, and values that contradict one another.
    """
    fields = fields_of_class(config, "AutoencoderKLWan")
    for key in ("dropout", "clip_output"):  # of training; no longer read by the class
        fields.pop(key, None)

    # They follow from other fields; they are compared below.
    factors = {
        "temporal": fields.pop("scale_factor_temporal", None),
        "spatial": fields.pop("scale_factor_spatial", None),
    }

    # Older configs lack the keys that Wan 2.2 introduced; the reference's defaults are Wan 2.1's.
    vae = fill(VideoVAE, {**VIDEO_VAES["wan2.1"], **fields}, "vae", dtype=dtype)
    vae.check()
    for (name, given), rate in zip(factors.items(), vae.rates, strict=True):
        if given not in (None, rate):
            raise ConfigError(
                f"vae.scale_factor_{name} = {given}, but the levels reduce by {rate}."
                " Correct dim_mult, temperal_downsample, patch_size or the factor."
            )
    return vae
