"""Latte (Ma et al. 2024): its config and its weights as those of our transformer.

Blocks over space and over time alternate. Only blocks over space attend to the text. Positions are
fixed and added. The network also predicts a variance, the second half of its output channels,
which is not used here.

References: `LatteTransformer3DModel` of diffusers; `LatteT2V` of the repository Vchitect/Latte,
whose folder has the same arrays and one more.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from vdx.interop.config_ranges import Channels, Heads, Layers, Pixels, read_config
from vdx.interop.keymap import KEEP, LINEAR, Layout, Row, WeightsError, listed, patches
from vdx.interop.load import load_model, open_weights
from vdx.interop.stored_array import StoredArray
from vdx.models.conditioning.text_signals import NULL
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes
from vdx.types import Params

CLASS = "LatteTransformer3DModel"
MAKERS_CLASS = "LatteT2V"
# Of the makers' folder. No forward pass reads it.
UNUSED = "caption_projection.y_embedding"
# Fields that have these values in every published model.
FIXED = {
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


# Fields that are read.
FIELDS = {
    "num_attention_heads": Heads,
    "attention_head_dim": Heads,
    "in_channels": Channels,
    "out_channels": Channels | None,
    "num_layers": Layers,
    "sample_size": Pixels,
    "patch_size": Pixels,
    "caption_channels": Channels,
}


class Dense(NamedTuple):
    """A dense layer by its two names."""

    ours: str
    theirs: str


class Stack(NamedTuple):
    """A stack of blocks, which is one position of our pattern."""

    theirs: str  # name of the stack
    attentions: tuple[Dense, ...]  # its attention layers


NETWORK = (
    Dense("time/up", "adaln_single.emb.timestep_embedder.linear_1"),
    Dense("time/down", "adaln_single.emb.timestep_embedder.linear_2"),
    Dense("modulation", "adaln_single.linear"),
)
TEXT = (
    Dense("project/up", "caption_projection.linear_1"),
    Dense("project/down", "caption_projection.linear_2"),
)
ATTENTION = (Dense("q", "to_q"), Dense("k", "to_k"), Dense("v", "to_v"), Dense("out", "to_out.0"))
MLP = (Dense("mlp/up", "ff.net.0.proj"), Dense("mlp/down", "ff.net.2"))
STACKS = (
    Stack("transformer_blocks", (Dense("space", "attn1"), Dense("cross", "attn2"))),
    Stack("temporal_transformer_blocks", (Dense("time", "attn1"),)),
)
OUT_BIAS = "proj_out.bias"  # its size shows whether the file predicts a variance


def first_half(pixels: int) -> Layout:
    """Return the layout of the last projection, which drops the variance.

    [(pixels 2 channels) ...] -> [... (pixels channels)]. The variance, the second half of the
    channels, is zero in a file that is written.
    """

    def ours(x: np.ndarray) -> np.ndarray:
        x = x.reshape(pixels, 2, -1, *x.shape[1:])[:, 0]
        return x.reshape(-1, *x.shape[2:]).T

    def theirs(x: np.ndarray) -> np.ndarray:
        x = x.T.reshape(pixels, 1, -1, *x.shape[:-1])
        return np.concatenate([x, np.zeros_like(x)], 1).reshape(-1, *x.shape[3:])

    return Layout(ours, theirs)


def latte_rows(model: Denoiser, variance: bool = True) -> list[Row]:
    """Return the rows of a Latte model.

    variance: whether the last layer of the file also predicts a variance. `null`, the dropped text,
    is zero until it is set: it is the encoding of the empty caption by T5.
    """
    network = model.backbone
    _, rows, columns = network.patch
    # The last layer.
    kernel = LINEAR
    bias = KEEP
    if variance:
        kernel = bias = first_half(rows * columns)

    # Outside of the blocks.
    out = [
        Row("pos_embed.proj.weight", "network/patch/kernel", patches((rows, columns))),
        Row("pos_embed.proj.bias", "network/patch/bias"),
        Row("scale_shift_table", "network/table"),
        Row("proj_out.weight", "network/unpatch/kernel", kernel),
        Row(OUT_BIAS, "network/unpatch/bias", bias),
        *_dense_rows(NETWORK, "", "network"),
        *_dense_rows(TEXT, "", "conditioning/embeddings"),
        Row(UNUSED, None),
        Row("", NULL),
    ]

    # The blocks, stacked by their position in the pattern.
    for position, stack in enumerate(STACKS):
        ours = f"network/layers/block_{position}"
        theirs = f"{stack.theirs}.{{i}}."
        for attention in stack.attentions:
            begins = f"{theirs}{attention.theirs}."
            out += _dense_rows(ATTENTION, begins, f"{ours}/{attention.ours}", "[{i}]")
        out += _dense_rows(MLP, theirs, ours, "[{i}]")
        out.append(Row(f"{theirs}scale_shift_table", f"{ours}/table[{{i}}]"))
    return out


def _dense_rows(
    layers: tuple[Dense, ...], theirs: str, ours: str, index: str = ""
) -> Iterator[Row]:
    """Yield the rows of dense layers whose names begin with `theirs` and `ours`.

    index: the end of our names, of layers in a stack.
    """
    for layer in layers:
        source = f"{theirs}{layer.theirs}"
        path = f"{ours}/{layer.ours}"
        yield Row(f"{source}.weight", f"{path}/kernel{index}", LINEAR)
        yield Row(f"{source}.bias", f"{path}/bias{index}")


def latte_denoiser(config: Mapping[str, Any]) -> Denoiser:
    """Return the model of a `config.json` of diffusers.

    Raises WeightsError that lists what is missing, and what our transformer does not support.
    """
    missing = [f"{key}: is missing" for key in SIZES if config.get(key) is None]
    if missing:
        raise WeightsError(listed("This is not the config of a Latte transformer:", missing))
    problems = _unsupported(config)
    if problems:
        raise WeightsError(listed("A Latte transformer that vdx does not support:", problems))

    patch = config["patch_size"]
    backbone = {
        "name": "transformer",
        "pattern": "latte",
        "channels": config["in_channels"],
        "patch": (1, patch, patch),
        "width": _width(config),
        "depth": 2 * config["num_layers"],  # their layer is a block over space and one over time
        "heads": config["num_attention_heads"],
        "mlp_ratio": 4.0,
        "sincos": config["sample_size"] // _position_step(config),
        "cross": "plain",
    }
    return Denoiser(backbone, {"embeddings": {"features": config["caption_channels"]}})


def _width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _position_step(config: Mapping[str, Any]) -> int:
    """Return the latent pixels between two positions, as diffusers scales them."""
    return config["patch_size"] * max(config["sample_size"] // 64, 1)


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """List what our transformer does not support."""
    supported = {**FIXED, "cross_attention_dim": _width(config)}
    problems = [
        f"{key} = {config.get(key)!r}, not {value!r}"
        for key, value in supported.items()
        if config.get(key) != value
    ]
    name = config.get("_class_name")
    if name not in (CLASS, MAKERS_CLASS):
        problems.insert(0, f"_class_name = {name!r}, not {CLASS!r} or {MAKERS_CLASS!r}")
    channels = config["in_channels"]
    out = config.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        problems.append(f"out_channels = {out}, not in_channels = {channels} or twice that")
    if config["sample_size"] % _position_step(config):
        problems.append(f"sample_size = {config['sample_size']} is no number of patches")
    return problems


def is_latte(path: str | Path) -> bool:
    """Return whether weights are those of a Latte transformer. Reads headers only.

    Raises WeightsError as `open_weights` does.
    """
    temporal = STACKS[1].theirs
    return any(key.startswith(temporal) for key in open_weights(path))


def load_latte(
    path: str | Path,
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """Return the parameters of `model` from a Latte transformer, on the mesh.

    path: its folder of diffusers or of its makers. dtype, trained: see `load_model`. Raises
    WeightsError for files as `open_weights` does, for a `config.json` as `latte_denoiser` does, and
    for a model that is another network than theirs.
    """
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise WeightsError(
            f"{config_file} is not there: no array of Latte depends on the width of a head. "
            "Keep the config.json of its folder next to the weights."
        )

    # Their network, for the comparison with `model`.
    source = open_weights(path)
    theirs = latte_denoiser(read_config(config_file, FIELDS))
    rows = latte_rows(model, _predicts_variance(source, theirs))
    return load_model(model, theirs, source, rows, path, mesh, dtype, trained)


def _predicts_variance(source: Mapping[str, StoredArray], theirs: Denoiser) -> bool:
    """Return whether the last layer of a file has more outputs than our network."""
    if OUT_BIAS not in source:
        return False
    params = new_shapes(theirs)
    return source[OUT_BIAS].shape != params["network"]["unpatch"]["bias"].shape
