"""What the forward pass keeps for the backward pass."""

from typing import Any

import jax

from vdx.config.build import ConfigError
from vdx.models.attention.blockwise import SAVED

_policies = jax.checkpoint_policies


# What is kept from the forward pass for the backward pass; beside it the input of every layer.
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "save_attention": _policies.save_only_these_names(SAVED),
    # As "full", but those inputs wait in the host's memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def check_remat(name: str, device: Any) -> None:
    """Raises ConfigError for a policy that needs memory of the host which the device lacks."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if name == "offload" and "pinned_host" not in kinds:
        raise ConfigError(
            f"config.model.backbone.remat = 'offload' needs memory of the kind "
            f"pinned_host, and {device.device_kind} has {', '.join(kinds)}. Take "
            "'full', which keeps the same on the device."
        )
