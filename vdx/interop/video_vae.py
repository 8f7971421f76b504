"""Weights and configs of public autoencoders: Wan 2.1 and 2.2, and Stable Diffusion's.

Two layouts of Wan's: that of diffusers (`vae/diffusion_pytorch_model.safetensors` beside a
`config.json`) and the original (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, and files made from them),
which comes without a config: VIDEO_VAES has them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vdx.config.build import ConfigError, fill
from vdx.interop.keymap import CONV, KEEP, LINEAR, Layout, Row, patches
from vdx.models.vae.image_vae import ImageVAE
from vdx.models.vae.video_vae import VideoVAE

VIDEO_VAES: dict[str, dict[str, Any]] = {
    "wan2.1": {
        "latents_mean": (
            -0.7571,
            -0.7089,
            -0.9113,
            0.1075,
            -0.1745,
            0.9653,
            -0.1517,
            1.5508,
            0.4134,
            -0.0715,
            0.5517,
            -0.3632,
            -0.1922,
            -0.9497,
            0.2503,
            -0.2921,
        ),
        "latents_std": (
            2.8184,
            1.4541,
            2.3275,
            2.6558,
            1.2196,
            1.7708,
            2.6052,
            2.0743,
            3.2687,
            2.1526,
            2.8652,
            1.5579,
            1.6382,
            1.1253,
            2.8251,
            1.9160,
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
            -0.2289,
            -0.0052,
            -0.1323,
            -0.2339,
            -0.2799,
            0.0174,
            0.1838,
            0.1557,
            -0.1382,
            0.0542,
            0.2813,
            0.0891,
            0.1570,
            -0.0098,
            0.0375,
            -0.1825,
            -0.2246,
            -0.1207,
            -0.0698,
            0.5109,
            0.2665,
            -0.2108,
            -0.2158,
            0.2502,
            -0.2055,
            -0.0322,
            0.1109,
            0.1567,
            -0.0729,
            0.0899,
            -0.2799,
            -0.1230,
            -0.0313,
            -0.1649,
            0.0117,
            0.0723,
            -0.2839,
            -0.2083,
            -0.0520,
            0.3748,
            0.0152,
            0.1957,
            0.1433,
            -0.2944,
            0.3573,
            -0.0548,
            -0.1681,
            -0.0667,
        ),
        "latents_std": (
            0.4765,
            1.0364,
            0.4514,
            1.1677,
            0.5313,
            0.4990,
            0.4818,
            0.5013,
            0.8158,
            1.0344,
            0.5894,
            1.0901,
            0.6885,
            0.6165,
            0.8454,
            0.4978,
            0.5759,
            0.3523,
            0.7135,
            0.6804,
            0.5833,
            1.4146,
            0.8986,
            0.5659,
            0.7069,
            0.5338,
            0.4889,
            0.4917,
            0.4069,
            0.4999,
            0.6866,
            0.4093,
            0.5709,
            0.6065,
            0.6415,
            0.4944,
            0.5726,
            1.2042,
            0.5458,
            1.6887,
            0.3971,
            1.0600,
            0.3943,
            0.5537,
            0.5444,
            0.4089,
            0.7468,
            0.7744,
        ),
    },
}

# Our name of a part -> its name in diffusers and in the original. Parts of a residual block:
RESIDUAL = {
    "norm1": ("norm1", "residual.0"),
    "conv1": ("conv1", "residual.2"),
    "norm2": ("norm2", "residual.3"),
    "conv2": ("conv2", "residual.6"),
    "shortcut": ("conv_shortcut", "shortcut"),
}
# Parts of the encoder and of the decoder:
CODER = {
    "conv_in": ("conv_in", "conv1"),
    "norm_out": ("norm_out", "head.0"),
    "conv_out": ("conv_out", "head.2"),
    "middle/res_0": ("mid_block.resnets.0", "middle.0"),
    "middle/attention_0": ("mid_block.attentions.0", "middle.1"),
    "middle/res_1": ("mid_block.resnets.1", "middle.2"),
}
LATENT = {"quant_conv": ("quant_conv", "conv1"), "post_quant_conv": ("post_quant_conv", "conv2")}


def _gamma(axes: int) -> Layout:
    """A norm's scale, which Wan stores with `axes` trailing axes of size one."""
    return Layout(lambda x: x.reshape(-1), lambda x: x.reshape(-1, *[1] * axes))


def dense_rows(theirs: str, ours: str, layout: Layout) -> Iterator[Row]:
    """A kernel and its bias."""
    yield Row(f"{theirs}.weight", f"{ours}/kernel", layout)
    yield Row(f"{theirs}.bias", f"{ours}/bias")


def _layer(theirs: str, ours: str, original: bool) -> Iterator[Row]:
    """Rows of one layer, whose kind our name says."""
    kind = ours.rsplit("/")[-1]
    if kind.startswith("res_"):
        for part, names in RESIDUAL.items():
            yield from _layer(f"{theirs}.{names[original]}", f"{ours}/{part}", original)
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


def _levels(vae: VideoVAE, coder: str, original: bool) -> Iterator[tuple[str, str]]:
    """(their name, our name) of the layers of the levels, in both without `encoder.`."""
    up, last = coder == "decoder", len(vae.dim_mult) - 1
    way = "up" if up else "down"
    count = 0  # of layers before this one, where levels are not nested
    for i in range(last + 1):
        names = []
        for j in range(vae.num_res_blocks + up):
            names.append(f"res_{j}")
            if not up and 2.0**-i in vae.attn_scales:
                names.append(f"attention_{j}")
        if i < last:
            names.append(f"{way}sample")
        for k, name in enumerate(names):
            if original:
                theirs = (
                    f"{way}samples.{i}.{way}samples.{k}"
                    if vae.is_residual
                    else f"{way}samples.{count}"
                )
            elif not up and not vae.is_residual:
                theirs = f"down_blocks.{count}"
            else:
                sampler = f"{way}sampler" + ("" if vae.is_residual else "s.0")
                theirs = f"{way}_blocks.{i}." + (
                    sampler if k >= len(names) - (i < last) else f"resnets.{k}"
                )
            yield theirs, f"{way}_{i}/{name}"
            count += 1


def video_vae_rows(vae: VideoVAE, original: bool = False) -> tuple[Row, ...]:
    """The keys of `AutoencoderKLWan` in diffusers, or (`original`) of the Wan team's files."""
    rows = [
        row for ours, names in LATENT.items() for row in _layer(names[original], ours, original)
    ]
    for coder in ("encoder", "decoder"):
        layers = [(names[original], ours) for ours, names in CODER.items()]
        for theirs, ours in (*layers, *_levels(vae, coder, original)):
            rows += _layer(f"{coder}.{theirs}", f"{coder}/{ours}", original)
    return tuple(rows)


def video_vae_from_config(config: Mapping[str, Any], dtype: str = "float32") -> VideoVAE:
    """The VAE that a diffusers `config.json` describes.

    Raises ConfigError for another class, unknown keys, and values that contradict one another.
    """
    fields = _of_class(config, "AutoencoderKLWan")
    for key in ("dropout", "clip_output"):  # of training, and what the class no longer reads
        fields.pop(key, None)
    want = [fields.pop(k, None) for k in ("scale_factor_temporal", "scale_factor_spatial")]
    # Older configs lack what Wan 2.2 introduced; the reference's defaults are Wan 2.1's.
    vae = fill(VideoVAE, {**VIDEO_VAES["wan2.1"], **fields}, "vae", dtype=dtype)
    vae.check()
    for given, rate, name in zip(want, vae.rates, ("temporal", "spatial"), strict=True):
        if given not in (None, rate):
            raise ConfigError(
                f"vae.scale_factor_{name} = {given}, but the levels reduce by {rate}."
                " Correct dim_mult, temperal_downsample, patch_size or the factor."
            )
    return vae


def norm_rows(theirs: str, ours: str) -> Iterator[Row]:
    """A norm over groups."""
    yield Row(f"{theirs}.weight", f"{ours}/norm/scale", KEEP)
    yield Row(f"{theirs}.bias", f"{ours}/norm/bias", KEEP)


def residual_rows(theirs: str, ours: str) -> Iterator[Row]:
    """An ImageResidual, `ResnetBlock2D` in diffusers."""
    for i in (1, 2):
        yield from norm_rows(f"{theirs}.norm{i}", f"{ours}/norm{i}")
        yield from dense_rows(f"{theirs}.conv{i}", f"{ours}/conv{i}", CONV)
    yield from dense_rows(f"{theirs}.conv_shortcut", f"{ours}/shortcut", patches((1, 1)))
    yield from dense_rows(f"{theirs}.time_emb_proj", f"{ours}/emb", LINEAR)


def image_vae_rows() -> tuple[Row, ...]:
    """The keys of `AutoencoderKL` in diffusers, the same for all its configurations; with the
    older names of the attention's matrices, which most public files have."""
    rows = [
        *dense_rows("quant_conv", "quant_conv", patches((1, 1))),
        *dense_rows("post_quant_conv", "post_quant_conv", patches((1, 1))),
    ]
    for coder, way in (("encoder", "down"), ("decoder", "up")):
        rows += [
            *dense_rows(f"{coder}.conv_in", f"{coder}/conv_in", CONV),
            *dense_rows(f"{coder}.conv_out", f"{coder}/conv_out", CONV),
            *norm_rows(f"{coder}.conv_norm_out", f"{coder}/norm_out"),
        ]
        level = f"{coder}.{way}_blocks.{{i}}"
        rows += residual_rows(f"{level}.resnets.{{j}}", f"{coder}/level_{{i}}_res_{{j}}")
        rows += dense_rows(f"{level}.{way}samplers.0.conv", f"{coder}/level_{{i}}_resample", CONV)
        middle = f"{coder}.mid_block"
        rows += residual_rows(f"{middle}.resnets.{{j}}", f"{coder}/middle_res_{{j}}")
        theirs, ours = f"{middle}.attentions.{{j}}", f"{coder}/middle_attention_{{j}}"
        rows += norm_rows(f"{theirs}.group_norm", f"{ours}/norm")
        for name, *others in (
            ("q", "to_q", "query"),
            ("k", "to_k", "key"),
            ("v", "to_v", "value"),
            ("out", "to_out.0", "proj_attn"),
        ):
            for other in others:
                rows += dense_rows(f"{theirs}.{other}", f"{ours}/{name}", LINEAR)
    return tuple(rows)


def image_vae_from_config(config: Mapping[str, Any], dtype: str = "float32") -> ImageVAE:
    """The VAE that a diffusers `config.json` describes.

    Raises ConfigError for another class, unknown keys, and parts that ImageVAE does not have.
    """
    fields = _of_class(config, "AutoencoderKL")
    for key in ("sample_size", "force_upcast"):  # of how it is run, not of what it is
        fields.pop(key, None)
    for key, only in (
        ("act_fn", {"silu"}),
        ("latents_mean", {None}),
        ("latents_std", {None}),
        ("down_block_types", {"DownEncoderBlock2D"}),
        ("up_block_types", {"UpDecoderBlock2D"}),
    ):
        value = fields.pop(key, next(iter(only)))
        if not set(value if isinstance(value, list | tuple) else [value]) <= only:
            raise ConfigError(f"vae.{key} = {value!r} is not supported, only {only.pop()!r}.")
    # The reference's defaults, which are smaller than any public VAE.
    return fill(
        ImageVAE, {"block_out_channels": (64,), "layers_per_block": 1, **fields}, "vae", dtype=dtype
    )


def _of_class(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config without notes such as `_diffusers_version`. Raises ConfigError."""
    if config.get("_class_name", name) != name:
        raise ConfigError(
            f"This config is of {config['_class_name']}, expected {name}: give the "
            "config.json of the folder `vae`."
        )
    return {key: value for key, value in config.items() if not key.startswith("_")}
