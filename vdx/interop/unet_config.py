"""The configs of diffusers for U-Nets and what is added to them, as fields of ours, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from vdx.interop.keymap import WeightsError, listed
from vdx.models.conditioning.text_signals import Embeddings
from vdx.models.denoiser import Denoiser

TOKENS = 77  # of CLIP, all of which are read, also those of the empty caption
# Of diffusers: the class of a whole network -> our `temporal`, and what its blocks are called.
CLASSES = {
    "UNet2DConditionModel": ("none", "2D"),
    "UNetMotionModel": ("motion", "Motion"),
    "UNet3DConditionModel": ("3d", "3D"),
}
ADAPTER = "MotionAdapter"
CONTROLS = {"ControlNetModel": ("image", "2D"), "SparseControlNetModel": ("sparse", "Motion")}
# What no public model has another value for; a tuple of these means the same.
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
# What says nothing about the network (arrays tell whether projections are convolutions), and what
# is read below. Any other key is of something that we do not have, unless it is off.
SILENT = {
    "sample_size",
    "upcast_attention",
    "use_linear_projection",
    "motion_max_seq_length",
    "addition_embed_type_num_heads",
}
READ = {
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "up_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "norm_num_groups",
    "cross_attention_dim",
    "use_motion_mid_block",
    "motion_num_attention_heads",
    "motion_norm_num_groups",
    "motion_layers_per_block",
    "conditioning_channels",
    "conditioning_embedding_out_channels",
    "concat_conditioning_mask",
    "use_simplified_condition_embedding",
}


def single(value: Any) -> Any:
    """What all entries of a list are."""
    if isinstance(value, list | tuple) and len(set(map(str, value))) == 1:
        return single(value[0])
    return value


def unknown(config: Mapping[str, Any]) -> list[str]:
    """What a config says that no U-Net of ours is."""
    problems = [
        f"{key} = {value!r}, not {FIXED[key]!r}"
        for key, value in config.items()
        if key in FIXED and value is not None and single(value) != FIXED[key]
    ]
    return problems + [
        f"{key} = {value!r}: not known"
        for key, value in config.items()
        if value and not key.startswith("_") and key not in {*FIXED, *SILENT, *READ}
    ]


def unet_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(backbone, signals) of a Denoiser for the `config.json` of a whole network in diffusers.

    Raises WeightsError that lists what is missing and what our U-Net cannot be.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise WeightsError(f"This config is of {name}; U-Nets are {', '.join(CLASSES)}.")
    temporal, kind = CLASSES[name]
    needed = (
        "in_channels",
        "out_channels",
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "up_block_types",
        "norm_num_groups",
        "cross_attention_dim",
    )
    if missing := [f"{key}: is missing" for key in needed if config.get(key) is None]:
        raise WeightsError(listed("This is not the config of a U-Net:", missing))
    problems, widths = unknown(config), tuple(config["block_out_channels"])
    attention = tuple("CrossAttn" in block for block in config["down_block_types"])
    for way, levels in (("down", attention), ("up", attention[::-1])):
        said = config[f"{way}_block_types"]
        known = [f"{'CrossAttn' * on}{way.title()}Block{kind}" for on in levels]
        if list(said) != known:
            problems.append(f"{way}_block_types = {list(said)}, not {known}")
    layers, extra = (
        single(config["layers_per_block"]),
        config["in_channels"] - config["out_channels"],
    )
    tokens = single(config["cross_attention_dim"])
    problems += [
        f"{key} = {value!r} differs from level to level"
        for key, value in (("layers_per_block", layers), ("cross_attention_dim", tokens))
        if not isinstance(value, int)
    ]
    if extra < 0:
        problems.append("in_channels is less than out_channels")
    heads, head_width = _heads(config, widths, temporal, problems)
    if problems:
        raise WeightsError(listed("A U-Net that vdx does not have:", problems))
    backbone = {
        "name": "unet",
        "channels": config["out_channels"],
        "widths": widths,
        "layers": layers,
        "attention": attention,
        "heads": heads,
        "head_width": head_width,
        "groups": config["norm_num_groups"],
        "temporal": temporal,
    }
    if temporal == "motion":
        backbone["motion_middle"] = bool(config.get("use_motion_mid_block", True))
    signals: dict[str, Any] = {
        "embeddings": {
            "features": tokens,
            "length": TOKENS,
            "null_tokens": TOKENS,
            "project": False,
        }
    }
    if extra:
        signals["concat"] = {"channels": extra}
    return backbone, signals


def _heads(
    config: Mapping[str, Any], widths: Sequence[int], temporal: str, problems: list[str]
) -> tuple[int, int]:
    """(heads, head_width) of our U-Net. `attention_head_dim` is the width of a head in 3D, where
    the first module has 8, and the number of heads elsewhere."""
    said = single(
        config.get("num_attention_heads")
        or config.get("attention_head_dim", 64 if temporal == "3d" else 8)
    )
    motion = single(config.get("motion_num_attention_heads", 8))
    if temporal == "3d":
        heads, head_width = 8, said
    elif isinstance(said, int):
        heads, head_width = said, 0
    else:
        heads, head_width = motion, single([w // n for w, n in zip(widths, said, strict=True)])
    if not isinstance(head_width, int):
        problems.append(f"heads of several widths: {head_width}")
    if temporal == "motion" and motion != heads:
        problems.append(f"motion_num_attention_heads = {motion}, not {heads}")
    return heads, head_width


def unet_config(model: Denoiser) -> dict[str, Any]:
    """The `config.json` of diffusers for a U-Net of ours.

    Raises WeightsError for one that diffusers does not have.
    """
    network, signals = model.backbone, model.signals
    names = {temporal: (name, kind) for name, (temporal, kind) in CLASSES.items()}
    text = {"project": True, "features": Embeddings.features, **signals.get("embeddings", {})}
    if (
        network.temporal not in [*names]
        or network.stem != (1, 1, 1)
        or text["project"]
        or set(signals) - {"embeddings", "concat", "control"}
    ):
        raise WeightsError(
            f"diffusers has no U-Net of model.temporal = {network.temporal!r}, stem = "
            f"{network.stem} and signals {dict(signals)}: it knows {', '.join(names)}, a stem of "
            "(1, 1, 1), embeddings that are not projected, concat and control."
        )
    name, kind = names[network.temporal]
    levels = network.attention
    motion = network.temporal == "motion"
    heads = [network.dims()[1].split(width)[0] for width in network.widths]
    config = {
        "_class_name": name,
        "sample_size": None,
        "out_channels": network.channels,
        "in_channels": network.channels + signals.get("concat", {}).get("channels", 0),
        "down_block_types": [f"{'CrossAttn' * on}DownBlock{kind}" for on in levels],
        "up_block_types": [f"{'CrossAttn' * on}UpBlock{kind}" for on in levels[::-1]],
        "block_out_channels": list(network.widths),
        "layers_per_block": network.layers,
        "norm_num_groups": network.groups,
        "cross_attention_dim": text["features"],
        "num_attention_heads" if motion else "attention_head_dim": network.head_width
        if network.temporal == "3d"
        else single(heads),
    }
    return config | (
        {"motion_num_attention_heads": network.heads, "use_motion_mid_block": network.motion_middle}
        if motion
        else {}
    )


def motion_config(model: Denoiser) -> dict[str, Any]:
    """The `config.json` of a MotionAdapter for the motion modules of a U-Net of ours."""
    config = unet_config(model)
    if config["_class_name"] != "UNetMotionModel":
        raise WeightsError("A MotionAdapter has motion modules: model.temporal = 'motion'.")
    return {
        "_class_name": ADAPTER,
        "block_out_channels": config["block_out_channels"],
        "motion_layers_per_block": config["layers_per_block"],
        "motion_norm_num_groups": config["norm_num_groups"],
        **{key: config[key] for key in ("motion_num_attention_heads", "use_motion_mid_block")},
    }


def control_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of the backbone, the signal `control`) for the `config.json` of a control branch."""
    kind, _ = CONTROLS[config["_class_name"]]
    sparse = kind == "sparse"
    simple = sparse and config.get("use_simplified_condition_embedding", True)
    hint = (
        ()
        if simple
        else tuple(config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256))
    )
    channels = config.get("conditioning_channels", 4 if sparse else 3)
    mask = sparse and config.get("concat_conditioning_mask", True)
    return {"control": kind, "hint": hint}, {
        "channels": channels + bool(mask),
        "side": 2 ** max(0, len(hint) - 1),
    }


def control_config(model: Denoiser) -> dict[str, Any]:
    """The `config.json` of diffusers for the control branch of a U-Net of ours."""
    network = model.backbone
    names = {kind: (name, blocks) for name, (kind, blocks) in CONTROLS.items()}
    if network.control not in names or "embeddings" not in model.signals:
        raise WeightsError(
            f"model.control = {network.control!r} is no branch that diffusers has: "
            f"it knows {', '.join(names)}, beside embeddings."
        )
    name, kind = names[network.control]
    sparse = network.control == "sparse"
    heads = single([network.dims()[1].split(width)[0] for width in network.widths])
    config = {
        "_class_name": name,
        "in_channels": network.channels,
        "down_block_types": [f"{'CrossAttn' * on}DownBlock{kind}" for on in network.attention],
        "block_out_channels": list(network.widths),
        "layers_per_block": network.layers,
        "norm_num_groups": network.groups,
        "attention_head_dim": heads,
        "cross_attention_dim": model.signals["embeddings"].get("features", Embeddings.features),
        "conditioning_channels": model.signals["control"]["channels"] - sparse,
        "conditioning_embedding_out_channels": list(network.hint) or None,
    }
    return config | (
        {
            "motion_num_attention_heads": network.heads,
            "concat_conditioning_mask": True,
            "use_simplified_condition_embedding": not network.hint,
        }
        if sparse
        else {}
    )
