"""A recurrent mixer: the past of a place as a state of constant size.

The recurrence is the real-gated linear recurrent unit of Griffin (De et al. 2024, section 2.4),
a selective state space with one number a feature:

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t v_t),   log a_t = -8 softplus(L) sigmoid(decay(x_t)),

v_t = v(x_t) the value, i_t = sigmoid(k(x_t)) what of it is written, L learned. It is linear in h,
so all frames are computed at once by a scan that is parallel over time, and the state of a place
is as large as one token. (A state of keys times values, as of Mamba-2 or of gated linear
attention, holds more, and a parallel scan would hold as many of them as there are frames.)
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdx.parallel import constrain, reshard_to_frames
from vdx.types import Array, DTypeLike, Float

STRENGTH = 8.0  # of the decay's gate, in Griffin's words c
HALF_LIVES = 0.5, 64.0  # in frames, of the features as they begin


def linear_scan(
    a: Float[Array, "b t h w f"],
    u: Float[Array, "b t h w f"],
    state: Float[Array, "b h w f"],
    reverse: bool = False,
) -> Array:
    """h_t = a_t h_{t-1} + u_t for every t, with h_{-1} = state; from the last frame to the first
    with `reverse`. In parallel: steps compose as (a, u), (a', u') -> (a a', a' u + u')."""
    first = -1 if reverse else 0
    u = u.at[:, first].add(a[:, first] * state)
    combine = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    return jax.lax.associative_scan(combine, (a, u), reverse=reverse, axis=1)[1]


def half_lives(key, shape, dtype=jnp.float32) -> Array:
    """An initializer of L: half-lives spread geometrically over the features, for gates half
    open."""
    lives = np.geomspace(*HALF_LIVES, shape[-1])
    return jnp.asarray(np.log(np.expm1(np.log(2) / (STRENGTH / 2 * lives))), dtype)


class Direction(nn.Module):
    """The recurrence in one direction of time, in float32: what decays is a product of many."""

    dtype: DTypeLike = jnp.float32
    reverse: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        v: Float[Array, "b t h w f"],
        state: Float[Array, "b h w f"],
    ) -> Array:
        width = v.shape[-1]
        open_, written = (
            jax.nn.sigmoid(nn.Dense(width, name=name, dtype=self.dtype)(x).astype(jnp.float32))
            for name in ("decay", "k")
        )
        rate = nn.softplus(self.param("decay_scale", half_lives, (width,), jnp.float32))
        log_a = -STRENGTH * rate * open_
        # 1 - a^2 without cancellation; the floor keeps the root's gradient finite.
        u = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), 1e-12)) * written * v
        return linear_scan(jnp.exp(log_a), u, state, self.reverse)


class Recurrent(nn.Module):
    """Each place of the token grid remembers its past in a state, read through a gate:
    out(gelu(q(x)) * h). It sees its frame and those before it; with `bidirectional`, a second
    recurrence from the end of the clip, added to the first, sees those after it.

    A clip may come in windows, or frame by frame in constant memory: what one leaves, `run` gives
    to the next, so that the result is that of the whole clip. At its start the state is zero.
    With a past it lies in the collection "cache", and moves on where that is mutable.
    """

    heads: int  # not used
    dtype: DTypeLike = jnp.float32
    bidirectional: bool = False
    temporal = True

    @nn.nowrap
    def flops(self, grid: tuple[int, int, int], width: int) -> float:
        return math.prod(grid) * width**2 * (14.0 if self.bidirectional else 10.0)

    @nn.compact
    def run(
        self, state: Float[Array, "b h w d"], x: Float[Array, "b t h w d"]
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b t h w d"]]:
        """(state, window) -> (state after it, y). The state is that of the forward recurrence."""
        width = x.shape[-1]
        x = constrain(x, "b t h w d", context="h")  # all frames of a place on one device
        q, v = (nn.Dense(width, name=name, dtype=self.dtype)(x) for name in "qv")
        v = constrain(v.astype(jnp.float32), "b t h w f", context="h")
        h = Direction(self.dtype, name="forward")(x, v, state)
        state = h[:, -1]
        if self.bidirectional:
            h = h + Direction(self.dtype, True, name="backward")(x, v, jnp.zeros_like(state))
        y = nn.Dense(width, name="out", dtype=self.dtype)((nn.gelu(q) * h).astype(self.dtype))
        return state, reshard_to_frames(y, "h")

    def step(
        self, state: Float[Array, "b h w d"], x: Float[Array, "b h w d"]
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b h w d"]]:
        """One frame: (state, x_t) -> (state, y_t), as a body of jax.lax.scan has it."""
        state, y = self.run(state, x[:, None])
        return state, y[:, 0]

    @nn.nowrap
    def new_state(self, x: Float[Array, "b t h w d"]) -> Float[Array, "b h w d"]:
        """The state before a clip like x."""
        return jnp.zeros((len(x), *x.shape[2:]), jnp.float32)

    def __call__(self, x: Float[Array, "b t h w d"], context: Any) -> Float[Array, "b t h w d"]:
        state, past = self.new_state(x), getattr(context, "past", None)
        if past is None:
            return self.run(state, x)[1]
        state, y = self.run(self.get_variable("cache", "state", state), x)
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "state", state)
        return y
