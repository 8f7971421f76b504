"""Exact attention between tokens that are split over the mesh axis `context`.

The functions run on every device (inside jax.shard_map), on its share of the tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vdx.models.attention.blockwise import HIDDEN, SAVED, backward, forward
from vdx.types import Array, Bool, Float

AXIS = "context"


def ulysses(
    attend: Callable[..., Array],
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    mask: Bool[Array, "c l"] | None,
    scale: float,
) -> Float[Array, "b l n d"]:
    """Attend between all tokens for a share of the heads (Jacobs et al. 2023).

    Each device exchanges its tokens of other heads for all tokens of its own heads, attends, and
    exchanges the results back. Heads that do not divide are filled up with empty ones.
    """
    # Give every device the same number of heads.
    heads = q.shape[2]
    missing = -heads % lax.axis_size(AXIS)

    def to_heads(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0)))
        return lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)

    # All tokens of a few heads, and back.
    if mask is not None:
        mask = lax.all_gather(mask, AXIS, axis=1, tiled=True)
    y = attend(to_heads(q), to_heads(k), to_heads(v), mask)
    return lax.all_to_all(y, AXIS, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]


def ring(
    attend: Callable[..., Array],
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    mask: Bool[Array, "c l"] | None,
    scale: float,
) -> Float[Array, "b l n d"]:
    """Attend to each device's keys in turn (Liu et al. 2023).

    Keys and values travel round the ring, so that no device ever holds all of them. The results of
    the shares are combined by their sums. In the backward pass the keys travel again. The
    attention to a share is `blockwise`, which returns the sums; `attend` is not used.
    """
    rows = (rearrange(a, "b s n d -> (b n) s d") for a in (q, k, v))
    if mask is not None:
        mask = mask[:, None]
    y = _ring(*rows, mask, scale)
    return rearrange(y, "(b n) q d -> b q n d", b=len(q))


def _to_next_device(x: Any) -> Any:
    """Send arrays to the next device of the ring."""
    parts = lax.axis_size(AXIS)
    return lax.ppermute(x, AXIS, [(i, (i + 1) % parts) for i in range(parts)])


def _around_ring(step: Callable[[Any, Any], Any], state: Any, share: Any) -> Any:
    """Return the state after step(state, share) with every device's share.

    The next share travels while the current one is processed.
    """

    def turn(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        state, share = carry
        return (step(state, share), _to_next_device(share)), None

    (state, share), _ = lax.scan(turn, (state, share), None, lax.axis_size(AXIS) - 1)
    return step(state, share)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    """Attend with rows [r q d] as `blockwise` does."""
    return _forward(q, k, v, mask, scale)[0]


def _forward(
    q: Array, k: Array, v: Array, mask: Array | None, scale: float
) -> tuple[Array, tuple[Any, ...]]:
    def step(state: tuple[Array, Array], share: tuple[Any, ...]) -> tuple[Array, Array]:
        y, sums = state
        k, v, mask = share
        share_y, share_sums = forward(q, k, v, mask, scale)

        # Weight both results by their parts of the softmax's sum.
        total = jnp.logaddexp(sums, share_sums)
        y = y * jnp.exp(sums - total)[..., None]
        return y + share_y * jnp.exp(share_sums - total)[..., None], total

    no_result = jnp.zeros(q.shape, jnp.float32)
    no_sums = jnp.full(q.shape[:2], HIDDEN)
    y, sums = _around_ring(step, (no_result, no_sums), (k, v, mask))
    y = checkpoint_name(y.astype(q.dtype), SAVED)
    sums = checkpoint_name(sums, SAVED)
    return y, (q, k, v, mask, y, sums)


def _backward(scale: float, saved: tuple[Any, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, y, sums = saved

    def step(state: tuple[Array, ...], share: tuple[Any, ...]) -> tuple[Array, ...]:
        dq, dk, dv = state
        k, v, mask = share
        share_dq, share_dk, share_dv = backward(q, k, v, mask, y, sums, dy, scale)
        # The gradient of a share travels one device behind it, and finally back to its owner.
        dk, dv = _to_next_device((dk, dv))
        return dq + share_dq, dk + share_dk, dv + share_dv

    zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    dq, dk, dv = _around_ring(step, zeros, (k, v, mask))
    dk, dv = _to_next_device((dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_forward, _backward)
