"""Configs of Wan transformers: of diffusers from arrays, and of our Denoiser.

References: `WanTransformer3DModel`, `WanVACETransformer3DModel` and `SkyReelsV2Transformer3DModel`
of diffusers.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from vdx.config.ranges import Index, Length
from vdx.interop.config_ranges import Channels, Heads, Layers, Pixels, Places
from vdx.interop.keymap import WeightsError, listed

WAN = "WanTransformer3DModel"
VACE = "WanVACETransformer3DModel"  # with control blocks
SKYREELS = "SkyReelsV2Transformer3DModel"
# Fields that have these values in every published model.
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6}
SIZES = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "ffn_dim",
    "num_layers",
)
# Fields that are read.
FIELDS = {
    "patch_size": tuple[Pixels, Pixels, Pixels],
    "num_attention_heads": Heads,
    "attention_head_dim": Heads,
    "in_channels": Channels,
    "out_channels": Channels,
    "text_dim": Channels,
    "freq_dim": Channels,
    "ffn_dim": Channels,
    "num_layers": Layers,
    "image_dim": Channels | None,
    "added_kv_proj_dim": Channels | None,
    "pos_embed_seq_len": Places | None,
    "vace_in_channels": Channels,
    "vace_layers": Annotated[tuple[Index, ...], Length(1000)] | None,
    "num_frame_per_block": Places,
    "inject_sample_info": bool,
}
TEXT_LENGTH = 512  # tokens, to which every Wan pads its text with zeros

# Keys of diffusers whose shapes give the sizes.
PATCH_KEY = "patch_embedding.weight"
OUT_KEY = "proj_out.weight"
TEXT_KEY = "condition_embedder.text_embedder.linear_1.weight"
TIME_KEY = "condition_embedder.time_embedder.linear_1.weight"
MLP_KEY = "blocks.0.ffn.net.0.proj.weight"
IMAGE_KEY = "condition_embedder.image_embedder.norm1.weight"
POSITIONS_KEY = "condition_embedder.image_embedder.pos_embed"
CONTROL_KEY = "vace_patch_embedding.weight"
RATE_KEY = "fps_embedding.weight"


class DenoiserFields(NamedTuple):
    """The fields of a Denoiser."""

    backbone: dict[str, Any]
    signals: dict[str, Any]


def wan_config(shapes: Mapping[str, Sequence[int]], head_width: int) -> dict[str, Any]:
    """Return the `config.json` of diffusers for arrays of these names and shapes.

    No shape depends on the width of a head. Raises WeightsError for arrays that are not of a Wan
    transformer.
    """
    _check_wan(shapes, head_width)
    width, channels, *patch = shapes[PATCH_KEY]
    depth = _num_layers(shapes, "blocks")

    # Every transformer has these.
    config: dict[str, Any] = {
        "_class_name": WAN,
        "patch_size": patch,
        "num_attention_heads": width // head_width,
        "attention_head_dim": head_width,
        "in_channels": channels,
        "out_channels": shapes[OUT_KEY][0] // math.prod(patch),
        "text_dim": shapes[TEXT_KEY][1],
        "freq_dim": shapes[TIME_KEY][1],
        "ffn_dim": shapes[MLP_KEY][0],
        "num_layers": depth,
        **FIXED,
        "rope_max_seq_len": 1024,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }

    # Images, control and the frame rate are inputs of some.
    if IMAGE_KEY in shapes:
        config["image_dim"] = shapes[IMAGE_KEY][0]
        config["added_kv_proj_dim"] = width
    if POSITIONS_KEY in shapes:
        config["pos_embed_seq_len"] = shapes[POSITIONS_KEY][1]
    if CONTROL_KEY in shapes:
        config["_class_name"] = VACE
        config["vace_in_channels"] = shapes[CONTROL_KEY][1]
        config["vace_layers"] = _spaced(depth, _num_layers(shapes, "vace_blocks"))
    if RATE_KEY in shapes:
        config["_class_name"] = SKYREELS
        config["inject_sample_info"] = True
    return config


def _check_wan(shapes: Mapping[str, Sequence[int]], head_width: int) -> None:
    """Raise WeightsError for arrays of another network, or a head that does not fit."""
    needed = (PATCH_KEY, OUT_KEY, TEXT_KEY, TIME_KEY, MLP_KEY)
    missing = [key for key in needed if key not in shapes]
    if missing:
        first = ", ".join(list(shapes)[:3])
        head = f"These are not the weights of a Wan transformer. They begin with {first} and lack:"
        raise WeightsError(listed(head, missing))

    width = shapes[PATCH_KEY][0]
    if width % head_width:
        raise WeightsError(
            f"The weights are {width} wide, which is no number of heads of {head_width}: "
            "set attention_head_dim in a config.json next to them."
        )


def _num_layers(keys: Iterable[str], stack: str) -> int:
    """Return the number of layers in a stack of keys such as "blocks.3.norm2.weight"."""
    matches = [re.match(rf"{stack}\.(\d+)\.", key) for key in keys]
    return 1 + max(int(match[1]) for match in matches if match)


def _spaced(depth: int, count: int) -> list[int]:
    """Return the layers, evenly spaced, to which `count` control blocks add hints."""
    return list(range(0, depth, _period(depth, count)))


def _period(depth: int, count: int) -> int:
    """Return the layers between two control blocks, rounded up."""
    return -(-depth // count)


def wan_from_config(config: Mapping[str, Any]) -> DenoiserFields:
    """Return the fields of a Denoiser for a `config.json` of diffusers.

    Raises WeightsError that lists what is missing, and what our transformer does not support.
    """
    missing = [f"{key}: is missing" for key in SIZES if config.get(key) is None]
    if missing:
        raise WeightsError(listed("This is not the config of a Wan transformer:", missing))

    problems = _unsupported(config)
    if problems:
        raise WeightsError(listed("A Wan transformer that vdx does not support:", problems))

    # One control block for each repetition of the pattern.
    depth = config["num_layers"]
    controls = config.get("vace_layers") or ()
    period = 1
    if controls:
        period = _period(depth, len(controls))

    # The mixer of every block.
    mixer: str | dict[str, Any] = "full"
    block = config.get("num_frame_per_block", 1)
    if block > 1:  # in diffusers a block of one frame means no mask at all
        mixer = {"name": "full", "block": block}

    width = _width(config)
    backbone = {
        "name": "transformer",
        "channels": config["out_channels"],
        "patch": tuple(config["patch_size"]),
        "pattern": (mixer,) * period,
        "width": width,
        "depth": depth,
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["ffn_dim"] / width,
    }
    return DenoiserFields(backbone, _signals(config))


def _width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """List what our transformer does not support."""
    controls = list(config.get("vace_layers") or ())

    # Values that fields must have, if they are there.
    supported: dict[str, Any] = {
        "_class_name": WAN,
        "freq_dim": 256,
        **FIXED,
        "added_kv_proj_dim": None,
    }
    if controls:
        supported["_class_name"] = VACE
    if config.get("_class_name") == SKYREELS:
        supported["_class_name"] = SKYREELS
    if config.get("image_dim"):
        supported["added_kv_proj_dim"] = _width(config)

    problems = [
        f"{key} = {config[key]!r}, not {value!r}"
        for key, value in supported.items()
        if key in config and config[key] != value
    ]

    # Our control blocks repeat with the pattern.
    depth = config["num_layers"]
    if controls:
        uneven = depth % _period(depth, len(controls)) != 0
        if uneven or controls != _spaced(depth, len(controls)):
            problems.append(
                f"vace_layers = {controls} are not evenly spaced from 0 over {depth} layers"
            )
    if config["in_channels"] < config["out_channels"]:
        problems.append("in_channels is less than out_channels")
    return problems


def _signals(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the conditioning signals of a Wan transformer."""
    signals: dict[str, Any] = {
        "embeddings": {"features": config["text_dim"], "length": TEXT_LENGTH}
    }
    if config.get("inject_sample_info"):
        signals["fps_class"] = {}
    concat_channels = config["in_channels"] - config["out_channels"]
    if concat_channels:
        signals["concat"] = {"channels": concat_channels}
    if config.get("image_dim"):
        signals["image_tokens"] = {
            "features": config["image_dim"],
            "positions": config.get("pos_embed_seq_len") or 0,
        }
    if config.get("vace_layers"):
        signals["control"] = {"channels": config["vace_in_channels"]}
    return signals
