"""Differences between a U-Net of ours and files that arrays do not show."""

from collections.abc import Iterator, Mapping
from typing import Any

from vdx.interop.unet_config import (
    ADAPTER,
    CONTROLS,
    control_from_config,
    single,
    unet_from_config,
    unknown,
)
from vdx.models.denoiser import Denoiser
from vdx.models.unet.unet import UNet

# Fields of a U-Net that weights have a value for; the last two where they have a temporal part.
FIELDS = ("channels", "widths", "layers", "attention", "groups", "stem")
TEMPORAL_FIELDS = ("temporal", "motion_middle")

# Entries of the configs of motion modules -> our fields. AnimateDiff's own files have the last two.
MOTION_FIELDS = {
    "motion_num_attention_heads": "heads",
    "motion_norm_num_groups": "groups",
    "use_motion_mid_block": "motion_middle",
    "_joint_norm": "joint_norm",
    "_joint_residual_norm": "joint_residual_norm",
}


def motion_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields that the config of motion modules has values for."""
    return {name: single(config[key]) for key, name in MOTION_FIELDS.items() if key in config}


def find_differences(
    model: Denoiser, configs: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any]
) -> list[str]:
    """Return the differences between a model and the configs of files.

    Each is one message. configs: class in diffusers -> its config; base: that of the whole network.
    Raises WeightsError for a config that is no U-Net of ours.
    """
    backbone, signals = unet_from_config(base)
    here = model.backbone
    there = Denoiser(backbone, signals).backbone

    adapter = configs.get(ADAPTER, {})
    wrong = [
        *_network_differences(here, there),
        *_adapter_differences(here, adapter),
        *unknown(adapter),
    ]

    for name, config in configs.items():
        if name in CONTROLS:
            wrong += _control_differences(model, name, config)
    return [*wrong, *_text_differences(model, signals["embeddings"])]


def _network_differences(here: UNet, there: UNet) -> Iterator[str]:
    """Yield the fields, then the sizes of heads, that the weights have otherwise."""
    has_temporal = there.temporal != "none"
    # Without a temporal part the weights say nothing about it.
    names = FIELDS + TEMPORAL_FIELDS if has_temporal else FIELDS
    for name in names:
        ours = getattr(here, name)
        theirs = getattr(there, name)
        if ours != theirs:
            yield f"config.model.backbone: {name} = {ours}, but the weights have {theirs}"

    our_blocks = here.dims().blocks
    their_blocks = there.dims().blocks
    kinds = (False, True) if has_temporal else (False,)  # attention in space, motion modules
    for width in here.widths:
        for motion in kinds:
            our_heads = our_blocks.heads_at(width, motion)
            their_heads = their_blocks.heads_at(width, motion)
            if our_heads != their_heads:
                yield (
                    f"config.model.backbone: heads x width {our_heads} "
                    f"at width {width}, but the weights have {their_heads}"
                )


def _adapter_differences(here: UNet, adapter: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields that differ from those of a motion adapter."""
    for name, theirs in motion_fields(adapter).items():
        ours = getattr(here, name)
        if ours != theirs:
            yield f"config.model.backbone.{name} = {ours}, but the motion modules have {theirs}"


def _text_differences(model: Denoiser, needed: Mapping[str, Any]) -> Iterator[str]:
    """Yield the fields of the text signal that the network needs otherwise."""
    text = model.signals.get("embeddings", {})
    for key in ("project", "length"):
        if text.get(key) != needed[key]:
            yield f"config.model.signals.embeddings.{key} = {text.get(key)}, not {needed[key]}"


def _control_differences(model: Denoiser, name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences from a control branch of class `name`."""
    here = model.backbone
    # Fields of the backbone.
    fields, signal = control_from_config(config)
    fields["groups"] = config.get("norm_num_groups", 32)
    for field, value in fields.items():
        ours = getattr(here, field)
        if ours != value:
            yield (
                f"config.model.backbone: {field} = {ours}, but the weights of "
                f"the {name} have {value}"
            )

    # Heads, in space and in motion modules.
    their_heads = single(config.get("num_attention_heads") or config.get("attention_head_dim", 8))
    blocks = here.dims().blocks
    our_heads = single([blocks.heads_at(width)[0] for width in here.widths])
    if their_heads != our_heads:
        yield f"config.model.backbone: heads = {our_heads}, but the {name} has {their_heads}"

    motion_heads = config.get("motion_num_attention_heads", here.heads)
    if single(motion_heads) != here.heads:
        yield (
            f"config.model.backbone: heads = {here.heads}, but the {name} has "
            f"motion_num_attention_heads = {motion_heads}"
        )

    # The signal that reads the maps.
    ours = model.signals.get("control", {})
    for key, value in signal.items():
        if ours.get(key, 1) != value:
            yield f"config.model.signals.control.{key} = {ours.get(key)}, not {value}"
    yield from unknown(config)
