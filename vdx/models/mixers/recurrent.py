"""A recurrent mixer: the past of a place as a state of constant size.

The recurrence is the real-gated linear recurrent unit of Griffin (De et al. 2024, section 2.4),
a selective state space with one number a feature:

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t v_t),   log a_t = -8 softplus(L) sigmoid(decay(x_t)),

where v_t = v(x_t) is the value, i_t = sigmoid(k(x_t)) gates its writing, and L is learned. The
recurrence is linear in h. A scan that is parallel over time therefore computes all frames at once,
and the state of a place is as large as one token. (A state of keys times values, as in Mamba-2 or
in gated linear attention, holds more. A parallel scan would hold one of them for each frame.)
"""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdx.models.layers import along_last
from vdx.models.mixers.context import Grid, MixContext
from vdx.parallel import constrain, reshard_to_frames
from vdx.types import Array, DTypeLike, Float, PRNGKeyArray

STRENGTH = 8.0  # of the decay's gate; c in Griffin
HALF_LIVES = 0.5, 64.0  # frames, the range over the features of a fresh layer
MIN_SQUARE = 1e-12  # floor of 1 - a^2, so that the gradient of its root stays finite


def linear_scan(
    a: Float[Array, "b t h w f"],
    u: Float[Array, "b t h w f"],
    state: Float[Array, "b h w f"],
    reverse: bool = False,
) -> Float[Array, "b t h w f"]:
    """Compute h_t = a_t h_{t-1} + u_t for every t, from h_{-1} = state.

    With `reverse` the recurrence runs from the last frame to the first. It is parallel over time:
    steps compose as (a, u), (a', u') -> (a a', a' u + u').
    """
    first = -1 if reverse else 0
    u = u.at[:, first].add(a[:, first] * state)

    def compose(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(compose, (a, u), reverse=reverse, axis=1)[1]


def half_lives(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "f"]:
    """Initialize L for half-lives spread geometrically over the features.

    They are those of half-open gates.
    """
    lives = np.geomspace(*HALF_LIVES, shape[-1])
    return jnp.asarray(np.log(np.expm1(np.log(2) / (STRENGTH / 2 * lives))), dtype)


class Direction(nn.Module):
    """The recurrence in one direction of time.

    It is float32, because the decay is a product of many factors.
    """

    dtype: DTypeLike = jnp.float32  # of the matrix products
    reverse: bool = False  # from the last frame to the first

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        v: Float[Array, "b t h w f"],
        state: Float[Array, "b h w f"],
    ) -> Float[Array, "b t h w f"]:
        """Return the state after each frame."""
        width = v.shape[-1]
        decay_gate, write_gate = (
            jax.nn.sigmoid(nn.Dense(width, name=name, dtype=self.dtype)(x).astype(jnp.float32))
            for name in ("decay", "k")
        )

        rate = nn.softplus(self.param("decay_scale", half_lives, (width,), jnp.float32))
        log_a = along_last(-STRENGTH * rate, x) * decay_gate
        # expm1 computes 1 - a^2 without cancellation.
        square = jnp.maximum(-jnp.expm1(2 * log_a), MIN_SQUARE)
        u = jnp.sqrt(square) * write_gate * v
        return linear_scan(jnp.exp(log_a), u, state, self.reverse)


class Recurrent(nn.Module):
    """A state for each place, read through a gate: out(gelu(q(x)) * h).

    A token reads its own frame and earlier ones. A clip may be processed in windows, or frame by
    frame in constant memory: `run` returns the state for the next window, and the result is that
    of the whole clip. The state before the clip is zero. With a past it is in the collection
    "cache", and is updated where that collection is mutable.
    """

    heads: int  # not used
    dtype: DTypeLike = jnp.float32  # of the matrix products
    # Add a second recurrence, from the end of the clip, so that later frames are read too.
    bidirectional: bool = False
    temporal: ClassVar[bool] = True  # as in `Mixer`
    crosses_frames: ClassVar[bool] = True  # as in `Mixer`
    causal_block: ClassVar[int | None] = None  # as in `Mixer`

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> float:
        """Return the operations of one forward pass of one clip."""
        return math.prod(grid) * width**2 * (14.0 if self.bidirectional else 10.0)

    @nn.compact
    def run(
        self, state: Float[Array, "b h w d"], x: Float[Array, "b t h w d"]
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b t h w d"]]:
        """Process a window: (state, x) -> (state after it, y).

        The state is that of the forward recurrence.
        """
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
        """Process one frame: (state, x_t) -> (state, y_t), a body of jax.lax.scan."""
        state, y = self.run(state, x[:, None])
        return state, y[:, 0]

    @nn.nowrap
    def new_state(self, x: Float[Array, "b t h w d"]) -> Float[Array, "b h w d"]:
        """Return the state before a clip of this shape."""
        return jnp.zeros((len(x), *x.shape[2:]), jnp.float32)

    def __call__(
        self, x: Float[Array, "b t h w d"], context: MixContext | None
    ) -> Float[Array, "b t h w d"]:
        """Mix tokens over time; with a past, from the state in the cache."""
        state = self.new_state(x)
        if context is None or context.past is None:
            return self.run(state, x)[1]

        state, y = self.run(self.get_variable("cache", "state", state), x)
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "state", state)
        return y
