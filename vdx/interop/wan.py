"""Wan 2.1, 2.2 and VACE, and what is trained from them to make clips block by block (SkyReels-V2,
CausVid, Self-Forcing): their configurations and their weights as those of our transformer.

References: `WanTransformer3DModel`, `WanVACETransformer3DModel` and `SkyReelsV2Transformer3DModel`
of diffusers, and the original repositories Wan-Video/Wan2.1 and Wan2.2, whose files (ComfyUI's,
CausVid's and Self-Forcing's too) name the same arrays in another way. One table holds all three
names of every layer: the original's become those of diffusers when a file is opened, and those
ours by rows.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vdx.files import read_json
from vdx.interop.keymap import KEEP, LINEAR, Layout, Row, WeightsError, listed, patches
from vdx.interop.load import load_model, open_weights
from vdx.interop.safetensors import StoredArray
from vdx.models.conditioning.text_signals import NULL
from vdx.models.denoiser import Denoiser
from vdx.types import Params


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
# Of diffusers. Without and with control, and SkyReels'; what no public model has another value for.
CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
SKYREELS = "SkyReelsV2Transformer3DModel"
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6}
HEAD_WIDTH = 128  # of every public model
# What the weights do not tell.
UNSEEN = {"_class_name", "rope_max_seq_len", "vace_layers", *FIXED}
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


def wan_config(shapes: Mapping[str, Sequence[int]], head_width: int) -> dict[str, Any]:
    """The `config.json` of diffusers for arrays of these names and shapes, which do not tell the
    width of a head.

    Raises WeightsError for arrays that are not of a Wan transformer.
    """
    at = "condition_embedder"
    patch_key, out_key, text_key, time_key, mlp_key = needed = (
        "patch_embedding.weight",
        "proj_out.weight",
        f"{at}.text_embedder.linear_1.weight",
        f"{at}.time_embedder.linear_1.weight",
        "blocks.0.ffn.net.0.proj.weight",
    )
    if missing := [key for key in needed if key not in shapes]:
        raise WeightsError(
            listed(
                "These are not the weights of a Wan transformer. They begin with "
                f"{', '.join(list(shapes)[:3])} and lack:",
                missing,
            )
        )
    (width, channels, *patch), depth = shapes[patch_key], _count(shapes, "blocks")
    if width % head_width:
        raise WeightsError(
            f"The weights are {width} wide, which is no number of heads of "
            f"{head_width}: attention_head_dim is another."
        )
    config: dict[str, Any] = {
        "_class_name": CLASSES[0],
        "patch_size": patch,
        "num_attention_heads": width // head_width,
        "attention_head_dim": head_width,
        "in_channels": channels,
        "out_channels": shapes[out_key][0] // math.prod(patch),
        "text_dim": shapes[text_key][1],
        "freq_dim": shapes[time_key][1],
        "ffn_dim": shapes[mlp_key][0],
        "num_layers": depth,
        **FIXED,
        "rope_max_seq_len": 1024,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }
    if f"{at}.image_embedder.norm1.weight" in shapes:
        config |= {
            "image_dim": shapes[f"{at}.image_embedder.norm1.weight"][0],
            "added_kv_proj_dim": width,
        }
    if f"{at}.image_embedder.pos_embed" in shapes:
        config["pos_embed_seq_len"] = shapes[f"{at}.image_embedder.pos_embed"][1]
    if "vace_patch_embedding.weight" in shapes:
        controls = _count(shapes, "vace_blocks")
        config |= {
            "_class_name": CLASSES[1],
            "vace_in_channels": shapes["vace_patch_embedding.weight"][1],
            "vace_layers": list(range(0, depth, -(-depth // controls))),
        }
    if "fps_embedding.weight" in shapes:
        config |= {"_class_name": SKYREELS, "inject_sample_info": True}
    return config


def _count(shapes: Mapping[str, Any], stack: str) -> int:
    return 1 + max(int(m[1]) for key in shapes if (m := re.match(rf"{stack}\.(\d+)\.", key)))


def wan_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(backbone, signals) of a Denoiser for a `config.json` of diffusers.

    Raises WeightsError that lists what is missing and what our transformer cannot be.
    """
    get = config.get
    sizes = (
        "patch_size",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "text_dim",
        "ffn_dim",
        "num_layers",
    )
    problems = [f"{key}: is missing" for key in sizes if get(key) is None]
    if problems:
        raise WeightsError(listed("This is not the config of a Wan transformer:", problems))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    depth, extra = config["num_layers"], config["in_channels"] - config["out_channels"]
    controls = get("vace_layers") or ()
    every = -(-depth // len(controls)) if controls else 1
    block = get("num_frame_per_block", 1)
    wanted = {
        "_class_name": SKYREELS if get("_class_name") == SKYREELS else CLASSES[bool(controls)],
        "freq_dim": 256,
        **FIXED,
        "added_kv_proj_dim": width if get("image_dim") else None,
    }
    problems = [
        f"{key} = {config[key]!r}, not {value!r}"
        for key, value in wanted.items()
        if key in config and config[key] != value
    ]
    if controls and (depth % every or list(controls) != list(range(0, depth, every))):
        problems.append(
            f"vace_layers = {list(controls)} are not evenly spaced from 0 over {depth} layers"
        )
    if extra < 0:
        problems.append("in_channels is less than out_channels")
    if problems:
        raise WeightsError(listed("A Wan transformer that vdx does not have:", problems))
    mixer = {"name": "full", "block": block} if block > 1 else "full"  # theirs is no mask for 1
    backbone = {
        "name": "transformer",
        "channels": config["out_channels"],
        "patch": tuple(config["patch_size"]),
        "pattern": (mixer,) * every,
        "width": width,
        "depth": depth,
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["ffn_dim"] / width,
    }
    signals: dict[str, Any] = {"embeddings": {"features": config["text_dim"], "length": 512}}
    if get("inject_sample_info"):
        signals["fps_class"] = {}
    if extra:
        signals["concat"] = {"channels": extra}
    if get("image_dim"):
        signals["image_tokens"] = {
            "features": config["image_dim"],
            "positions": get("pos_embed_seq_len") or 0,
        }
    if controls:
        signals["control"] = {"channels": config["vace_in_channels"]}
    return backbone, signals


@dataclasses.dataclass(frozen=True)
class Wan:
    """A Wan transformer in files: `config` as diffusers has it, `source` for load_params, and
    the fields of the Denoiser that it is."""

    config: dict[str, Any]
    source: dict[str, StoredArray]
    backbone: dict[str, Any]
    signals: dict[str, Any]


def open_wan(path: str | Path) -> Wan:
    """The Wan transformer in a file or folder, in the layout of diffusers, of the original
    repositories or of ComfyUI. Reads headers only.

    Raises WeightsError for what is not one, and for a `config.json` that disagrees with the
    weights.
    """
    source = diffusers_names(open_weights(path))
    given = Path(path) / "config.json"
    said = read_json(given) if given.exists() else {}
    if "attention_head_dim" not in said:  # the original's config has other names
        said = {}
    config = wan_config(
        {key: stored.shape for key, stored in source.items()},
        said.get("attention_head_dim", HEAD_WIDTH),
    )
    wrong = [
        f"{key} = {said[key]!r}, but the weights have {value!r}"
        for key, value in config.items()
        if key in said and said[key] != value and key not in UNSEEN
    ]
    if wrong:
        raise WeightsError(listed(f"{given} disagrees with the weights beside it:", wrong))
    return Wan(config | said, source, *wan_from_config(config | said))


def load_wan(
    path: str | Path,
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """The parameters of `model` from a Wan transformer in a file or folder, on the mesh.

    dtype, trained: as of `load_model`. `null`, the dropped text, is zero: no file has it. The
    blocks of the model's pattern may be others than theirs, or none: weights know nothing of them.
    Raises
    WeightsError for files as `open_wan`, and for a model that is another network than theirs.
    """
    wan = open_wan(path)
    return load_model(
        model,
        Denoiser(wan.backbone, wan.signals),
        wan.source,
        wan_transformer_rows(model),
        path,
        mesh,
        dtype,
        trained,
    )
