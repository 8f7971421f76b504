"""Exact attention between tokens that lie on several devices, along the mesh axis `context`.

Functions here run on every device (inside jax.shard_map), on its share of the tokens.
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
    run: Callable[..., Array],
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    mask: Bool[Array, "b l"] | None,
    scale: float,
) -> Float[Array, "b l n d"]:
    """Every device gives the others its tokens of their heads, attends with `run` for its heads
    between all tokens, and gives the answers back (Jacobs et al. 2023). Heads that do not divide
    are filled up with empty ones."""
    heads, parts = q.shape[2], lax.axis_size(AXIS)

    def to_heads(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -heads % parts), (0, 0)))
        return lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True)

    if mask is not None:
        mask = lax.all_gather(mask, AXIS, axis=1, tiled=True)
    y = run(to_heads(q), to_heads(k), to_heads(v), mask)
    return lax.all_to_all(y, AXIS, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]


def ring(
    run: Callable[..., Array],
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    mask: Bool[Array, "b l"] | None,
    scale: float,
) -> Float[Array, "b l n d"]:
    """Keys and values go round, so that no device ever holds all of them, and the answers to each
    share are put together by their sums (Liu et al. 2023). In the backward pass they go round
    again. What attends to a share is `blockwise`, whatever `run` is: it gives the sums."""
    rows = (rearrange(a, "b s n d -> (b n) s d") for a in (q, k, v))
    y = _ring(*rows, None if mask is None else mask[:, None], scale)
    return rearrange(y, "(b n) q d -> b q n d", b=len(q))


def _on(x: Any) -> Any:
    """To the next device."""
    parts = lax.axis_size(AXIS)
    return lax.ppermute(x, AXIS, [(i, (i + 1) % parts) for i in range(parts)])


def _round(step: Callable[[Any, Any], Any], state: Any, share: Any) -> Any:
    """The state after step(state, share) for every device's share; the next travels meanwhile."""

    def turn(carry, _):
        state, share = carry
        return (step(state, share), _on(share)), None

    (state, share), _ = lax.scan(turn, (state, share), None, lax.axis_size(AXIS) - 1)
    return step(state, share)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring(q, k, v, seen, scale):
    return _forward(q, k, v, seen, scale)[0]


def _forward(q, k, v, seen, scale):
    def step(state, share):
        (y, sums), (k, v, seen) = state, share
        y1, sums1 = forward(q, k, v, seen, scale)
        total = jnp.logaddexp(sums, sums1)
        weigh = lambda a, part: a * jnp.exp(part - total)[..., None]
        return weigh(y, sums) + weigh(y1, sums1), total

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], HIDDEN)
    y, sums = _round(step, nothing, (k, v, seen))
    y, sums = (checkpoint_name(a, SAVED) for a in (y.astype(q.dtype), sums))
    return y, (q, k, v, seen, y, sums)


def _backward(scale, saved, dy):
    q, k, v, seen, y, sums = saved

    def step(state, share):
        (dq, dk, dv), (k, v, seen) = state, share
        one = backward(q, k, v, seen, y, sums, dy, scale)
        # A share's gradient travels after it; it is one device behind, and at last comes home.
        return tuple(a + b for a, b in zip((dq, *_on((dk, dv))), one, strict=True))

    nothing = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    dq, dk, dv = _round(step, nothing, (k, v, seen))
    dk, dv = _on((dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_forward, _backward)
