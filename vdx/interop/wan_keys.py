"""Wan's layers under three names: ours, those of diffusers, those of the original."""

import re
from collections.abc import Iterator, Mapping

from vdx.interop.keymap import KEEP, LINEAR, Layout, Row, patches
from vdx.interop.stored_array import StoredArray
from vdx.models.conditioning.signals import NULL
from vdx.models.denoiser import Denoiser


def halves(heads: int) -> Layout:
    """Rows of a query or key [(n pairs 2) ...] in our order [... (n 2 pairs)].

    Wan rotates neighbouring channels of a head against one another, we rotate the halves; the
    rows of the projection, its bias and the scale of its norm move alike, so nothing is lost.
    """

    def move(x, shape):
        return x.reshape(heads, *shape, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Layout(lambda x: move(x, (-1, 2)).T, lambda x: move(x.T, (2, -1)))


FIRST = Layout(lambda x: x[0], lambda x: x[None])  # [1 ...] -> [...]

# Kinds of layers: (their array, ours, layout). None: depends on the sizes of the model.
DENSE = (("weight", "kernel", LINEAR), ("bias", "bias", KEEP))
NORM = (("weight", "scale", KEEP), ("bias", "bias", KEEP))
SCALE = (("weight", "scale", KEEP),)
TABLE = (("", "", FIRST),)
PATCH = (("weight", "kernel", None), ("bias", "bias", KEEP))
ROTATED = (("weight", "kernel", None), ("bias", "bias", None))
ROTATED_SCALE = (("weight", "scale", None),)

# (our layer, that of diffusers, of the original, kind)
Layers = tuple[tuple[str, str, str, tuple], ...]
NETWORK: Layers = (
    ("patch", "patch_embedding", "patch_embedding", PATCH),
    ("time/up", "condition_embedder.time_embedder.linear_1", "time_embedding.0", DENSE),
    ("time/down", "condition_embedder.time_embedder.linear_2", "time_embedding.2", DENSE),
    ("modulation", "condition_embedder.time_proj", "time_projection.1", DENSE),
    ("table", "scale_shift_table", "head.modulation", TABLE),
    ("unpatch", "proj_out", "head.head", DENSE),
)
BLOCK: Layers = (
    ("table", "scale_shift_table", "modulation", TABLE),
    ("full/q", "attn1.to_q", "self_attn.q", ROTATED),
    ("full/k", "attn1.to_k", "self_attn.k", ROTATED),
    ("full/v", "attn1.to_v", "self_attn.v", DENSE),
    ("full/out", "attn1.to_out.0", "self_attn.o", DENSE),
    ("full/q_norm", "attn1.norm_q", "self_attn.norm_q", ROTATED_SCALE),
    ("full/k_norm", "attn1.norm_k", "self_attn.norm_k", ROTATED_SCALE),
    ("cross_norm", "norm2", "norm3", NORM),
    ("cross/q", "attn2.to_q", "cross_attn.q", DENSE),
    ("cross/k", "attn2.to_k", "cross_attn.k", DENSE),
    ("cross/v", "attn2.to_v", "cross_attn.v", DENSE),
    ("cross/out", "attn2.to_out.0", "cross_attn.o", DENSE),
    ("cross/q_norm", "attn2.norm_q", "cross_attn.norm_q", SCALE),
    ("cross/k_norm", "attn2.norm_k", "cross_attn.norm_k", SCALE),
    ("mlp/up", "ffn.net.0.proj", "ffn.0", DENSE),
    ("mlp/down", "ffn.net.2", "ffn.2", DENSE),
)
IMAGE_BLOCK: Layers = (
    ("cross/image_k", "attn2.add_k_proj", "cross_attn.k_img", DENSE),
    ("cross/image_v", "attn2.add_v_proj", "cross_attn.v_img", DENSE),
    ("cross/image_k_norm", "attn2.norm_added_k", "cross_attn.norm_k_img", SCALE),
)
TEXT: Layers = (
    ("project/up", "condition_embedder.text_embedder.linear_1", "text_embedding.0", DENSE),
    ("project/down", "condition_embedder.text_embedder.linear_2", "text_embedding.2", DENSE),
)
IMAGE: Layers = (
    ("position_table", "condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos", TABLE),
    ("norm_in", "condition_embedder.image_embedder.norm1", "img_emb.proj.0", NORM),
    ("project/up", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1", DENSE),
    ("project/down", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", DENSE),
    ("norm_out", "condition_embedder.image_embedder.norm2", "img_emb.proj.4", NORM),
)
RATE: Layers = (
    ("embed", "fps_embedding", "fps_embedding", (("weight", "embedding", KEEP),)),
    ("project/up", "fps_projection.net.0.proj", "fps_projection.0", DENSE),
    ("project/down", "fps_projection.net.2", "fps_projection.2", DENSE),
)
CONTROL: Layers = (("control_patch", "vace_patch_embedding", "vace_patch_embedding", PATCH),)
CONTROL_IN: Layers = (("control_in", "proj_in", "before_proj", DENSE),)  # of the first block
HINT: Layers = (("hint", "proj_out", "after_proj", DENSE),)

# Names of the original -> of diffusers: in blocks and outside of them.
IN_BLOCKS = {old: new for _, new, old, _ in BLOCK + IMAGE_BLOCK + CONTROL_IN + HINT}
OUTSIDE = {old: new for _, new, old, _ in NETWORK + TEXT + IMAGE + RATE + CONTROL}
KEY = re.compile(r"^((?:vace_)?blocks\.\d+\.)?(.*?)(\.weight|\.bias)?$")
# Of ComfyUI's files, and inside of those of CausVid and Self-Forcing, as saved from FSDP too.
PREFIX = re.compile(r"^(model\.)?diffusion_model\.|^model\.(_fsdp_wrapped_module\.)?")
TRAINED = ("generator_ema.", "generator.")  # of a file of theirs, the averaged weights first


def wan_transformer_rows(model: Denoiser) -> list[Row]:
    """The rows of a Wan model, its transformer and its signals, in the names of diffusers.

    `null`, the dropped text, is not in the files; it is what UMT5 makes of the empty caption, and
    zero until it is given.
    """
    network, signals = model.backbone, model.signals
    _, depth, heads, pattern = network.dims()

    def rows(layers: Layers, theirs: str, ours: str, index: str = "") -> Iterator[Row]:
        for our, their, _, kind in layers:
            sized = patches(network.patch) if kind is PATCH else halves(heads)
            for their_leaf, our_leaf, layout in kind:
                yield Row(
                    f"{theirs}{their}.{their_leaf}".removesuffix("."),
                    f"{ours}/{our}/{our_leaf}".removesuffix("/") + index,
                    layout or sized,
                )

    block = BLOCK + (IMAGE_BLOCK if "image_tokens" in signals else ())
    out = [*rows(NETWORK, "", "network"), *rows(TEXT, "", "conditioning/embeddings"), Row("", NULL)]
    for i in range(depth):
        period, place = divmod(i, len(pattern))
        out += rows(block, f"blocks.{i}.", f"network/layers/block_{place}", f"[{period}]")
    if "fps_class" in signals:
        out += rows(RATE, "", "conditioning/fps_class")
    if "image_tokens" in signals:
        out += rows(IMAGE, "", "conditioning/image_tokens")
        out.append(Row("blocks.{i}.attn2.norm_added_q.weight", None))  # older files; never read
    if "control" in signals:
        out += [*rows(CONTROL, "", "network"), *rows(CONTROL_IN, "vace_blocks.0.", "network")]
        for i in range(depth // len(pattern)):
            out += rows(block, f"vace_blocks.{i}.", "network/layers/control", f"[{i}]")
            out += rows(HINT, f"vace_blocks.{i}.", "network/layers", f"[{i}]")
    return out


def diffusers_names(source: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """The same arrays by the names of diffusers, whichever of the layouts they are in."""
    for part in TRAINED:
        if any(key.startswith(part) for key in source):
            source = {
                key.removeprefix(part): stored
                for key, stored in source.items()
                if key.startswith(part)
            }
    source = {PREFIX.sub("", key): stored for key, stored in source.items()}
    if "head.modulation" not in source:
        return source
    return {KEY.sub(_renamed, key): stored for key, stored in source.items()}


def _renamed(key: re.Match) -> str:
    block, layer, leaf = key.groups(default="")
    return block + (IN_BLOCKS if block else OUTSIDE).get(layer, layer) + leaf


def original_name(key: str) -> str:
    """The original's name of an array or a layer that diffusers names `key`."""
    match = KEY.match(key)
    assert match, key
    block, layer, leaf = match.groups(default="")
    names = IN_BLOCKS if block else OUTSIDE
    return block + next((old for old, new in names.items() if new == layer), layer) + leaf
