"""Rematerialisation: the activations that are kept for the backward pass."""

from typing import Any

import jax

from vdx.config.build import ConfigError
from vdx.models.attention.blockwise import SAVED

RESIDUAL = "residual"  # the checkpoint name of a block's input

_policies = jax.checkpoint_policies

# Each policy also keeps the input of every layer.
REMAT = {
    # Keep all activations.
    "none": None,
    # Keep nothing else; recompute each layer.
    "full": _policies.nothing_saveable,
    # Keep the results of matrix products with parameters.
    "dots": _policies.dots_with_no_batch_dims_saveable,
    # Keep the results of attention and the sums of its softmax.
    "save_attention": _policies.save_only_these_names(SAVED),
    # Like "full", with the inputs of the layers moved to the host's memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[RESIDUAL],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def check_remat(name: str, device: Any) -> None:
    """Check that a device has the memory that a policy needs.

    Raises:
        ConfigError: the policy is "offload" and the device has no pinned host memory.
    """
    kinds = [memory.kind for memory in device.addressable_memories()]
    if name == "offload" and "pinned_host" not in kinds:
        raise ConfigError(
            "config.model.backbone.remat = 'offload' needs memory of the kind "
            f"pinned_host, and {device.device_kind} has {', '.join(kinds)}. Set "
            "'full', which keeps the same arrays on the device."
        )
