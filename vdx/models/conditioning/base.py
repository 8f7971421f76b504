"""What signals have in common."""

import jax.numpy as jnp

from vdx.types import Array, Bool

Clip = tuple[int, ...]  # (t, h, w, c) of the noisy clip


def kept(x: Array, drop: Bool[Array, "b"]) -> Array:
    """float32 x, zero where dropped."""
    return jnp.where(drop.reshape(-1, *(1,) * (x.ndim - 1)), 0.0, x.astype(jnp.float32))
