"""Latte (Ma et al. 2024): its configuration and its weights as those of our transformer.

Reference: `LatteTransformer3DModel` of diffusers. Blocks over space and over time take turns; text
is read over space alone; positions are fixed and added; the network also predicts a variance,
the second half of its channels, which is left behind.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vdx.files import read_json
from vdx.interop.keymap import KEEP, LINEAR, Layout, Row, WeightsError, listed, patches
from vdx.interop.load import load_model, open_weights
from vdx.models.conditioning.signals import NULL
from vdx.models.denoiser import Denoiser
from vdx.types import Params

CLASS = "LatteTransformer3DModel"
# What no public model has another value for.
FIXED = {
    "_class_name": CLASS,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
}
SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "caption_channels",
)
# (ours, theirs) of dense layers.
NETWORK = (
    ("time/up", "adaln_single.emb.timestep_embedder.linear_1"),
    ("time/down", "adaln_single.emb.timestep_embedder.linear_2"),
    ("modulation", "adaln_single.linear"),
)
TEXT = (
    ("project/up", "caption_projection.linear_1"),
    ("project/down", "caption_projection.linear_2"),
)
ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
MLP = (("mlp/up", "ff.net.0.proj"), ("mlp/down", "ff.net.2"))
# Place in the pattern -> (stack, (ours, theirs) of its attentions).
BLOCKS = (
    ("transformer_blocks", (("space", "attn1"), ("cross", "attn2"))),
    ("temporal_transformer_blocks", (("time", "attn1"),)),
)


def first_half(pixels: int) -> Layout:
    """Rows of the last projection [(pixels 2 channels) ...] as ours [... (pixels channels)]: what
    predicts the variance is cut off, and zero in a file that is written."""

    def ours(x: np.ndarray) -> np.ndarray:
        x = x.reshape(pixels, 2, -1, *x.shape[1:])[:, 0]
        return x.reshape(-1, *x.shape[2:]).T

    def theirs(x: np.ndarray) -> np.ndarray:
        x = x.T.reshape(pixels, 1, -1, *x.shape[:-1])
        return np.concatenate([x, np.zeros_like(x)], 1).reshape(-1, *x.shape[3:])

    return Layout(ours, theirs)


def latte_rows(model: Denoiser, variance: bool = True) -> list[Row]:
    """The rows of a Latte model; variance: whether the file's last layer predicts one too. `null`,
    the dropped text, is zero until it is given: it is what T5 makes of the empty caption."""
    network = model.backbone
    patch = network.patch[1:]

    def dense(layers, theirs: str, ours: str, index: str = "") -> Iterator[Row]:
        for our, their in layers:
            yield Row(f"{theirs}{their}.weight", f"{ours}/{our}/kernel{index}", LINEAR)
            yield Row(f"{theirs}{their}.bias", f"{ours}/{our}/bias{index}")

    last = first_half(patch[0] * patch[1]) if variance else None
    out = [
        Row("pos_embed.proj.weight", "network/patch/kernel", patches(patch)),
        Row("pos_embed.proj.bias", "network/patch/bias"),
        Row("scale_shift_table", "network/table"),
        Row("proj_out.weight", "network/unpatch/kernel", last or LINEAR),
        Row("proj_out.bias", "network/unpatch/bias", last or KEEP),
        *dense(NETWORK, "", "network"),
        *dense(TEXT, "", "conditioning/embeddings"),
        Row("", NULL),
    ]
    for place, (stack, attentions) in enumerate(BLOCKS):
        ours, theirs = f"network/layers/block_{place}", f"{stack}.{{i}}."
        for our, their in attentions:
            out += dense(ATTENTION, f"{theirs}{their}.", f"{ours}/{our}", "[{i}]")
        out += [
            *dense(MLP, theirs, ours, "[{i}]"),
            Row(f"{theirs}scale_shift_table", f"{ours}/table[{{i}}]"),
        ]
    return out


def latte_denoiser(config: Mapping[str, Any]) -> Denoiser:
    """The model of a `config.json` of diffusers.

    Raises WeightsError that lists what is missing and what our transformer cannot be.
    """
    if missing := [f"{key}: is missing" for key in SIZES if config.get(key) is None]:
        raise WeightsError(listed("This is not the config of a Latte transformer:", missing))
    heads, patch = config["num_attention_heads"], config["patch_size"]
    width, channels = heads * config["attention_head_dim"], config["in_channels"]
    wanted = {**FIXED, "cross_attention_dim": width}
    problems = [
        f"{key} = {config.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if config.get(key) != value
    ]
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        problems.append(f"out_channels = {out}, not in_channels = {channels} or twice that")
    base, rest = divmod(config["sample_size"], patch * max(config["sample_size"] // 64, 1))
    if rest:
        problems.append(f"sample_size = {config['sample_size']} is no number of patches")
    if problems:
        raise WeightsError(listed("A Latte transformer that vdx does not have:", problems))
    backbone = {
        "name": "transformer",
        "pattern": "latte",
        "channels": channels,
        "patch": (1, patch, patch),
        "width": width,
        "depth": 2 * config["num_layers"],
        "heads": heads,
        "mlp_ratio": 4.0,
        "sincos": base,
        "cross": "plain",
    }
    return Denoiser(backbone, {"embeddings": {"features": config["caption_channels"]}})


def is_latte(path: str | Path) -> bool:
    """Whether a file or folder of weights is of a Latte transformer. Reads headers only; raises
    WeightsError as `open_weights`."""
    return any(key.startswith(BLOCKS[1][0]) for key in open_weights(path))


def load_latte(
    path: str | Path,
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """The parameters of `model` from a folder of diffusers that holds a Latte transformer.

    dtype, trained: as of `load_model`. Raises WeightsError for files as `open_weights`, for a
    `config.json` as `latte_denoiser`, and for a model that is another network than theirs.
    """
    given = Path(path) / "config.json"
    if not given.is_file():
        raise WeightsError(
            f"{given} is not there: the weights of Latte do not tell the width of a "
            "head. Keep the config.json of its folder beside them."
        )
    source, theirs = open_weights(path), latte_denoiser(read_json(given))
    there = jax.eval_shape(theirs.new_params, jax.random.key(0))["network"]["unpatch"]["bias"]
    variance = source["proj_out.bias"].shape != there.shape if "proj_out.bias" in source else False
    return load_model(
        model, theirs, source, latte_rows(model, variance), path, mesh, dtype, trained
    )
