"""The configs of diffusers for U-Nets, as fields of ours, and back.

Motion adapters and control branches have configs too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vdx.interop.config_ranges import Blocks, Channels, Heads, Levels, Names
from vdx.interop.keymap import WeightsError, listed
from vdx.models.conditioning.text_signals import Embeddings
from vdx.models.denoiser import Denoiser
from vdx.models.unet.unet import UNet

TOKENS = 77  # of CLIP; all are read, also those of the empty caption


class DiffusersClass(NamedTuple):
    """A class of diffusers."""

    kind: str  # our field `temporal` of a whole network, or `control` of a branch
    blocks: str  # suffix of the names of its blocks


# Whole networks, the adapter of motion modules, and control branches.
CLASSES = {
    "UNet2DConditionModel": DiffusersClass("none", "2D"),
    "UNetMotionModel": DiffusersClass("motion", "Motion"),
    "UNet3DConditionModel": DiffusersClass("3d", "3D"),
}
ADAPTER = "MotionAdapter"
CONTROLS = {
    "ControlNetModel": DiffusersClass("image", "2D"),
    "SparseControlNetModel": DiffusersClass("sparse", "Motion"),
}
# Keys that have one value in all pretrained models; a tuple of these means the same.
FIXED = {
    "flip_sin_to_cos": True,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_layers": 1,
    "attention_type": "default",
    "time_embedding_type": "positional",
    "resnet_out_scale_factor": 1,
    "transformer_layers_per_block": 1,
    "transformer_layers_per_mid_block": 1,
    "temporal_transformer_layers_per_block": 1,
    "temporal_transformer_layers_per_mid_block": 1,
    "motion_transformer_layers_per_block": 1,
    "motion_transformer_layers_per_mid_block": 1,
    "motion_mid_block_layers_per_block": 1,
    "controlnet_conditioning_channel_order": "rgb",
}
# Keys without a meaning for the network: its arrays show whether projections are convolutions.
SILENT = {
    "sample_size",
    "upcast_attention",
    "use_linear_projection",
    "motion_max_seq_length",
    "addition_embed_type_num_heads",
}
# Keys that are read below. Any other key is of a part that we do not have, unless it is off.
FIELDS = {
    "in_channels": Channels,
    "out_channels": Channels,
    "block_out_channels": Levels,
    "layers_per_block": Blocks,
    "down_block_types": Names,
    "up_block_types": Names,
    "attention_head_dim": Heads | Levels | None,
    "num_attention_heads": Heads | Levels | None,
    "norm_num_groups": Channels,
    "cross_attention_dim": Channels | Levels,
    "use_motion_mid_block": bool,
    "motion_num_attention_heads": Heads | Levels,
    "motion_norm_num_groups": Channels,
    "motion_layers_per_block": Blocks,
    "conditioning_channels": Channels,
    "conditioning_embedding_out_channels": Levels | None,
    "concat_conditioning_mask": bool,
    "use_simplified_condition_embedding": bool,
}
# Keys that the config of a whole network must have.
REQUIRED = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "norm_num_groups",
    "cross_attention_dim",
)


def single(value: Any) -> Any:
    """Return the value that all entries of a list have; other values as they are."""
    if isinstance(value, list | tuple) and len(set(map(str, value))) == 1:
        return single(value[0])
    return value


def unknown(config: Mapping[str, Any]) -> list[str]:
    """Return the entries of a config that no U-Net of ours has, one message each."""
    problems = [
        f"{key} = {value!r}, not {FIXED[key]!r}"
        for key, value in config.items()
        if key in FIXED and value is not None and single(value) != FIXED[key]
    ]
    known = {*FIXED, *SILENT, *FIELDS}
    return problems + [
        f"{key} = {value!r}: not known"
        for key, value in config.items()
        if value and not key.startswith("_") and key not in known
    ]


# Whole networks


def unet_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (backbone, signals) of a Denoiser for a network's `config.json`.

    Raises WeightsError that lists the missing keys, or the parts that our U-Net does not have.
    """
    # Is it a U-Net?
    name = config.get("_class_name")
    if name not in CLASSES:
        raise WeightsError(f"This config is of {name}; U-Nets are {', '.join(CLASSES)}.")
    missing = [f"{key}: is missing" for key in REQUIRED if config.get(key) is None]
    if missing:
        raise WeightsError(listed("This is not the config of a U-Net:", missing))

    # Lists of the levels are of one length.
    levels = ("block_out_channels", "down_block_types", "num_attention_heads", "attention_head_dim")
    lists = {key: config[key] for key in levels if isinstance(config.get(key), list | tuple)}
    lengths = [f"{key} = {value}: {len(value)} levels" for key, value in lists.items()]
    if len(set(map(len, lists.values()))) > 1 or not config["block_out_channels"]:
        raise WeightsError(listed("Lists of a U-Net's levels have one length, not:", lengths))

    # Is it one of ours?
    temporal, kind = CLASSES[name]
    widths = tuple(config["block_out_channels"])
    attention = tuple("CrossAttn" in block for block in config["down_block_types"])
    heads = _heads(config, widths, temporal)
    problems = [
        *unknown(config),
        *_block_problems(config, attention, kind),
        *_size_problems(config),
        *_head_problems(config, heads, temporal),
    ]
    if problems:
        raise WeightsError(listed("A U-Net that vdx does not have:", problems))

    # The backbone, in our fields.
    backbone = {
        "name": "unet",
        "channels": config["out_channels"],
        "widths": widths,
        "layers": single(config["layers_per_block"]),
        "attention": attention,
        "heads": heads.heads,
        "head_width": heads.head_width,
        "groups": config["norm_num_groups"],
        "temporal": temporal,
    }
    if temporal == "motion":
        backbone["motion_middle"] = bool(config.get("use_motion_mid_block", True))

    return backbone, _signals(config)


def _signals(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the signals of a network: the text, and channels next to the clip."""
    signals: dict[str, Any] = {
        "embeddings": {
            "features": single(config["cross_attention_dim"]),
            "length": TOKENS,
            "null_tokens": TOKENS,
            "project": False,
        }
    }
    extra = config["in_channels"] - config["out_channels"]
    if extra:
        signals["concat"] = {"channels": extra}
    return signals


def _block_problems(
    config: Mapping[str, Any], attention: Sequence[bool], kind: str
) -> Iterator[str]:
    """Yield the lists of blocks that our U-Net does not have.

    attention: of its levels.
    """
    for way, levels in (("down", attention), ("up", attention[::-1])):
        given = list(config[f"{way}_block_types"])
        ours = _block_types(way, levels, kind)
        if given != ours:
            yield f"{way}_block_types = {given}, not {ours}"


def _block_types(way: str, attention: Sequence[bool], kind: str) -> list[str]:
    """Return the names of the blocks on the way "down" or "up", in diffusers."""
    return [f"{'CrossAttn' * on}{way.title()}Block{kind}" for on in attention]


def _size_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield sizes that our U-Net cannot have."""
    for key in ("layers_per_block", "cross_attention_dim"):
        value = single(config[key])
        if not isinstance(value, int):
            yield f"{key} = {value!r} differs from level to level"
    if config["in_channels"] < config["out_channels"]:
        yield "in_channels is less than out_channels"


class _Heads(NamedTuple):
    """Two fields of our U-Net, as a config has them."""

    heads: int
    head_width: Any  # a list if the heads of the levels differ in width


def _heads(config: Mapping[str, Any], widths: Sequence[int], temporal: str) -> _Heads:
    """Return the heads of a network.

    `attention_head_dim` is the width of a head in 3D, where the first module has 8 heads, and the
    number of heads elsewhere.
    """
    default = 64 if temporal == "3d" else 8
    given = single(config.get("num_attention_heads") or config.get("attention_head_dim", default))
    if temporal == "3d":
        return _Heads(8, given)
    if isinstance(given, int):
        return _Heads(given, 0)
    head_widths = [width // heads for width, heads in zip(widths, given, strict=True)]
    return _Heads(_motion_heads(config), single(head_widths))


def _motion_heads(config: Mapping[str, Any]) -> Any:
    return single(config.get("motion_num_attention_heads", 8))


def _head_problems(config: Mapping[str, Any], heads: _Heads, temporal: str) -> Iterator[str]:
    """Yield heads that our U-Net cannot have."""
    if not isinstance(heads.head_width, int):
        yield f"heads of several widths: {heads.head_width}"
    if temporal == "motion" and _motion_heads(config) != heads.heads:
        yield f"motion_num_attention_heads = {_motion_heads(config)}, not {heads.heads}"


def unet_config(model: Denoiser) -> dict[str, Any]:
    """Return the `config.json` of diffusers for a U-Net of ours.

    Raises WeightsError for one that diffusers does not have.
    """
    network: UNet = model.backbone
    signals = model.signals
    # kind -> class of diffusers
    names = {row.kind: name for name, row in CLASSES.items()}
    text = {"project": True, "features": Embeddings.features, **signals.get("embeddings", {})}

    # Raise for parts that diffusers does not have.
    if (
        network.temporal not in [*names]
        or network.stem != (1, 1, 1)
        or text["project"]
        or set(signals) - {"embeddings", "concat", "control"}
    ):
        raise WeightsError(
            f"diffusers has no U-Net of model.temporal = {network.temporal!r}, stem = "
            f"{network.stem} and signals {dict(signals)}: it has {', '.join(names)}, a stem of "
            "(1, 1, 1), embeddings that are not projected, concat and control."
        )

    name = names[network.temporal]
    blocks = CLASSES[name].blocks
    config = {
        "_class_name": name,
        "sample_size": None,
        "out_channels": network.channels,
        "in_channels": network.channels + signals.get("concat", {}).get("channels", 0),
        "down_block_types": _block_types("down", network.attention, blocks),
        "up_block_types": _block_types("up", network.attention[::-1], blocks),
        "block_out_channels": list(network.widths),
        "layers_per_block": network.layers,
        "norm_num_groups": network.groups,
        "cross_attention_dim": text["features"],
    }
    return config | _head_entries(network)


def _head_entries(network: UNet) -> dict[str, Any]:
    """Return the entries of a config for heads and motion modules."""
    if network.temporal == "3d":
        return {"attention_head_dim": network.head_width}
    if network.temporal != "motion":
        return {"attention_head_dim": _level_heads(network)}
    return {
        "num_attention_heads": _level_heads(network),
        "motion_num_attention_heads": network.heads,
        "use_motion_mid_block": network.motion_middle,
    }


def _level_heads(network: UNet) -> Any:
    """Return the heads of attention in space: one number, or a list if levels differ."""
    blocks = network.dims().blocks
    return single([blocks.heads_at(width)[0] for width in network.widths])


# Motion adapters and control branches


def motion_config(model: Denoiser) -> dict[str, Any]:
    """Return the `config.json` of a MotionAdapter.

    It is for the motion modules of a U-Net of ours. Raises WeightsError for a U-Net without motion
    modules.
    """
    config = unet_config(model)
    if config["_class_name"] != "UNetMotionModel":
        raise WeightsError("A MotionAdapter has motion modules: model.temporal = 'motion'.")
    return {
        "_class_name": ADAPTER,
        "block_out_channels": config["block_out_channels"],
        "motion_layers_per_block": config["layers_per_block"],
        "motion_norm_num_groups": config["norm_num_groups"],
        "motion_num_attention_heads": config["motion_num_attention_heads"],
        "use_motion_mid_block": config["use_motion_mid_block"],
    }


def control_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (fields of the backbone, the signal `control`) for a control branch.

    config: its `config.json`.
    """
    kind = CONTROLS[config["_class_name"]].kind
    sparse = kind == "sparse"
    hint: tuple[int, ...] = ()
    simple = sparse and config.get("use_simplified_condition_embedding", True)
    if not simple:
        hint = tuple(config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256))

    channels = config.get("conditioning_channels", 4 if sparse else 3)
    if sparse and config.get("concat_conditioning_mask", True):
        channels += 1  # the mask of the frames that have a map
    signal = {"channels": channels, "side": 2 ** max(0, len(hint) - 1)}
    fields = {"control": kind, "hint": hint}
    if "_joint_norm" in config:  # of AnimateDiff's own file
        fields["joint_norm"] = config["_joint_norm"]
    return fields, signal


def control_config(model: Denoiser) -> dict[str, Any]:
    """Return the `config.json` of diffusers for the control branch of a U-Net of ours.

    Raises WeightsError for a branch that diffusers does not have.
    """
    network: UNet = model.backbone
    # kind -> class of diffusers
    names = {row.kind: name for name, row in CONTROLS.items()}

    if network.control not in names or "embeddings" not in model.signals:
        raise WeightsError(
            f"model.control = {network.control!r} is no branch that diffusers has: "
            f"it has {', '.join(names)}, with the signal embeddings."
        )

    name = names[network.control]
    sparse = network.control == "sparse"
    config = {
        "_class_name": name,
        "in_channels": network.channels,
        "down_block_types": _block_types("down", network.attention, CONTROLS[name].blocks),
        "block_out_channels": list(network.widths),
        "layers_per_block": network.layers,
        "norm_num_groups": network.groups,
        "attention_head_dim": _level_heads(network),
        "cross_attention_dim": model.signals["embeddings"].get("features", Embeddings.features),
        # Without the mask, which diffusers adds itself.
        "conditioning_channels": model.signals["control"]["channels"] - sparse,
        "conditioning_embedding_out_channels": list(network.hint) or None,
    }
    if sparse:
        config |= {
            "motion_num_attention_heads": network.heads,
            "concat_conditioning_mask": True,
            "use_simplified_condition_embedding": not network.hint,
        }
    return config
