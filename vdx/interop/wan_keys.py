"""The layers of Wan by three names: ours, those of diffusers, and the original's.

One table has all three names of every layer. The original's names become those of diffusers when a
file is opened; rows lead from those of diffusers to our parameters. Files of ComfyUI, CausVid and
Self-Forcing have the original's names with a prefix.

References: `WanTransformer3DModel`, `WanVACETransformer3DModel` and `SkyReelsV2Transformer3DModel`
of diffusers; the repositories Wan-Video/Wan2.1 and Wan2.2.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vdx.interop.keymap import KEEP, LINEAR, Layout, Row, patches
from vdx.interop.stored_array import StoredArray
from vdx.models.conditioning.text_signals import NULL
from vdx.models.denoiser import Denoiser
from vdx.models.transformer import Transformer


def halves(heads: int) -> Layout:
    """Return the layout of queries and keys, which are rotated.

    [(n pairs 2) ...] -> [... (n 2 pairs)]. Wan rotates neighbouring channels of a head against one
    another, we rotate its halves. The rows of the projection, its bias and the scale of its norm
    move in the same way, so the network computes the same.
    """

    def swap(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        return x.reshape(heads, *shape, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Layout(lambda x: swap(x, (-1, 2)).T, lambda x: swap(x.T, (2, -1)))


class Leaf(NamedTuple):
    """One array of a layer."""

    theirs: str
    ours: str
    layout: Layout | str  # a name: it depends on the model, see `_sized_layouts`


class Layer(NamedTuple):
    """One layer by its three names, and its arrays."""

    ours: str
    diffusers: str
    original: str
    leaves: tuple[Leaf, ...]


FIRST = Layout(lambda x: x[0], lambda x: x[None])  # [1 ...] -> [...]

DENSE = (Leaf("weight", "kernel", LINEAR), Leaf("bias", "bias", KEEP))
NORM = (Leaf("weight", "scale", KEEP), Leaf("bias", "bias", KEEP))
SCALE = (Leaf("weight", "scale", KEEP),)
TABLE = (Leaf("", "", FIRST),)
EMBED = (Leaf("weight", "embedding", KEEP),)
PATCH = (Leaf("weight", "kernel", "patches"), Leaf("bias", "bias", KEEP))
ROTATED = (Leaf("weight", "kernel", "halves"), Leaf("bias", "bias", "halves"))
ROTATED_SCALE = (Leaf("weight", "scale", "halves"),)

NETWORK = (
    Layer("patch", "patch_embedding", "patch_embedding", PATCH),
    Layer("time/up", "condition_embedder.time_embedder.linear_1", "time_embedding.0", DENSE),
    Layer("time/down", "condition_embedder.time_embedder.linear_2", "time_embedding.2", DENSE),
    Layer("modulation", "condition_embedder.time_proj", "time_projection.1", DENSE),
    Layer("table", "scale_shift_table", "head.modulation", TABLE),
    Layer("unpatch", "proj_out", "head.head", DENSE),
)
BLOCK = (
    Layer("table", "scale_shift_table", "modulation", TABLE),
    Layer("full/q", "attn1.to_q", "self_attn.q", ROTATED),
    Layer("full/k", "attn1.to_k", "self_attn.k", ROTATED),
    Layer("full/v", "attn1.to_v", "self_attn.v", DENSE),
    Layer("full/out", "attn1.to_out.0", "self_attn.o", DENSE),
    Layer("full/q_norm", "attn1.norm_q", "self_attn.norm_q", ROTATED_SCALE),
    Layer("full/k_norm", "attn1.norm_k", "self_attn.norm_k", ROTATED_SCALE),
    Layer("cross_norm", "norm2", "norm3", NORM),
    Layer("cross/q", "attn2.to_q", "cross_attn.q", DENSE),
    Layer("cross/k", "attn2.to_k", "cross_attn.k", DENSE),
    Layer("cross/v", "attn2.to_v", "cross_attn.v", DENSE),
    Layer("cross/out", "attn2.to_out.0", "cross_attn.o", DENSE),
    Layer("cross/q_norm", "attn2.norm_q", "cross_attn.norm_q", SCALE),
    Layer("cross/k_norm", "attn2.norm_k", "cross_attn.norm_k", SCALE),
    Layer("mlp/up", "ffn.net.0.proj", "ffn.0", DENSE),
    Layer("mlp/down", "ffn.net.2", "ffn.2", DENSE),
)
# Cross-attention to the features of an image.
IMAGE_BLOCK = (
    Layer("cross/image_k", "attn2.add_k_proj", "cross_attn.k_img", DENSE),
    Layer("cross/image_v", "attn2.add_v_proj", "cross_attn.v_img", DENSE),
    Layer("cross/image_k_norm", "attn2.norm_added_k", "cross_attn.norm_k_img", SCALE),
)
TEXT = (
    Layer("project/up", "condition_embedder.text_embedder.linear_1", "text_embedding.0", DENSE),
    Layer("project/down", "condition_embedder.text_embedder.linear_2", "text_embedding.2", DENSE),
)
_IMAGE = "condition_embedder.image_embedder"
IMAGE = (
    Layer("position_table", f"{_IMAGE}.pos_embed", "img_emb.emb_pos", TABLE),
    Layer("norm_in", f"{_IMAGE}.norm1", "img_emb.proj.0", NORM),
    Layer("project/up", f"{_IMAGE}.ff.net.0.proj", "img_emb.proj.1", DENSE),
    Layer("project/down", f"{_IMAGE}.ff.net.2", "img_emb.proj.3", DENSE),
    Layer("norm_out", f"{_IMAGE}.norm2", "img_emb.proj.4", NORM),
)
# The frame rate (SkyReels).
RATE = (
    Layer("embed", "fps_embedding", "fps_embedding", EMBED),
    Layer("project/up", "fps_projection.net.0.proj", "fps_projection.0", DENSE),
    Layer("project/down", "fps_projection.net.2", "fps_projection.2", DENSE),
)
# Control blocks (VACE): the patches they read, a projection before the first one, one after each.
CONTROL = (Layer("control_patch", "vace_patch_embedding", "vace_patch_embedding", PATCH),)
CONTROL_IN = (Layer("control_in", "proj_in", "before_proj", DENSE),)
HINT = (Layer("hint", "proj_out", "after_proj", DENSE),)

# Names of the original -> of diffusers: in blocks and outside of them.
IN_BLOCKS = {layer.original: layer.diffusers for layer in BLOCK + IMAGE_BLOCK + CONTROL_IN + HINT}
OUTSIDE = {layer.original: layer.diffusers for layer in NETWORK + TEXT + IMAGE + RATE + CONTROL}
KEY = re.compile(r"^((?:vace_)?blocks\.\d+\.)?(.*?)(\.weight|\.bias)?$")  # block, layer, leaf
# Of ComfyUI's files, and inside of those of CausVid and Self-Forcing, also as saved from FSDP.
PREFIX = re.compile(r"^(model\.)?diffusion_model\.|^model\.(_fsdp_wrapped_module\.)?")
# Networks in a file of CausVid or Self-Forcing; the averaged weights are preferred.
TRAINED = ("generator_ema.", "generator.")
# Begins the keys of a distilled generator. That of ComfyUI's files is no such prefix.
DISTILLED = re.compile(r"^(generator_ema\.|generator\.|model\.(?!diffusion_model\.))")
# In older files of diffusers. No model reads it.
UNUSED = "blocks.{i}.attn2.norm_added_q.weight"


def wan_transformer_rows(model: Denoiser) -> list[Row]:
    """Return the rows of a Wan model, by the names of diffusers.

    They cover its transformer and its signals. `null`, the dropped text, is not in the files. It is
    the encoding of the empty caption by UMT5, and zero until it is set.
    """
    network = model.backbone
    signals = model.signals
    sized = _sized_layouts(network)
    dims = network.dims()

    # Outside of the blocks.
    rows = [
        *_rows(NETWORK, "", "network", sized),
        *_rows(TEXT, "", "conditioning/embeddings", sized),
        Row("", NULL),
    ]

    # The blocks. Ours are stacked by their position in the pattern.
    block: tuple[Layer, ...] = BLOCK
    if "image_tokens" in signals:
        block = BLOCK + IMAGE_BLOCK
    for i in range(dims.depth):
        period, position = divmod(i, len(dims.pattern))
        ours = f"network/layers/block_{position}"
        rows += _rows(block, f"blocks.{i}.", ours, sized, f"[{period}]")

    # The signals that only some models have.
    if "fps_class" in signals:
        rows += _rows(RATE, "", "conditioning/fps_class", sized)
    if "image_tokens" in signals:
        rows += _rows(IMAGE, "", "conditioning/image_tokens", sized)
        rows.append(Row(UNUSED, None))

    # One control block for each repetition of the pattern.
    if "control" in signals:
        rows += _rows(CONTROL, "", "network", sized)
        rows += _rows(CONTROL_IN, "vace_blocks.0.", "network", sized)
        for i in range(dims.periods):
            theirs = f"vace_blocks.{i}."
            rows += _rows(block, theirs, "network/layers/control", sized, f"[{i}]")
            rows += _rows(HINT, theirs, "network/layers", sized, f"[{i}]")
    return rows


def _sized_layouts(network: Transformer) -> dict[str, Layout]:
    """Return the layouts that depend on the sizes of a model."""
    return {"patches": patches(network.patch), "halves": halves(network.dims().heads)}


def _rows(
    layers: tuple[Layer, ...], theirs: str, ours: str, sized: Mapping[str, Layout], index: str = ""
) -> Iterator[Row]:
    """Yield the rows of layers whose names begin with `theirs` and `ours`.

    index: the end of our names, of a layer in a stack.
    """
    for layer in layers:
        for leaf in layer.leaves:
            source = f"{theirs}{layer.diffusers}.{leaf.theirs}".removesuffix(".")
            path = f"{ours}/{layer.ours}/{leaf.ours}".removesuffix("/") + index
            layout = sized[leaf.layout] if isinstance(leaf.layout, str) else leaf.layout
            yield Row(source, path, layout)


def distilled_prefix(source: Mapping[str, StoredArray]) -> str | None:
    """Return the prefix by which keys are those of CausVid or Self-Forcing, or None."""
    for key in source:
        match = DISTILLED.match(key)
        if match:
            return match[0]
    return None


def diffusers_names(source: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """Return the same arrays by the names of diffusers, from any of the layouts."""
    for network in TRAINED:
        if any(key.startswith(network) for key in source):
            source = {
                key.removeprefix(network): stored
                for key, stored in source.items()
                if key.startswith(network)
            }

    source = {PREFIX.sub("", key): stored for key, stored in source.items()}
    if "head.modulation" not in source:
        return source
    return {KEY.sub(_diffusers_name, key): stored for key, stored in source.items()}


def _diffusers_name(key: re.Match[str]) -> str:
    """Return diffusers' name of a KEY of the original."""
    block, layer, leaf = key.groups(default="")
    return block + _names(block).get(layer, layer) + leaf


def original_name(key: str) -> str:
    """Return the original's name of an array or a layer that diffusers names `key`."""
    match = KEY.match(key)
    assert match, key
    block, layer, leaf = match.groups(default="")
    names = _names(block).items()
    original = next((old for old, new in names if new == layer), layer)
    return block + original + leaf


def _names(block: str) -> dict[str, str]:
    """Return the names of layers in blocks, or outside of them if `block` is empty."""
    return IN_BLOCKS if block else OUTSIDE
