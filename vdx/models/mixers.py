"""Mixers: how the tokens of a clip exchange information. One table, one signature.

A mixer is a linen module `(heads, dtype)` that maps the token grid [b t h w d] and a
`MixContext` to a grid of the same shape. The transformer's `pattern` names rows of MIXERS.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange

from vdx.models.attention import attend
from vdx.models.layers import RMSNorm, apply_rope
from vdx.parallel import constrain
from vdx.types import Array, Float


class MixContext(flax.struct.PyTreeNode):
    """What a mixer may need besides the tokens: rotary tables [t h w 1 d/2] (cos, sin)."""

    rope: tuple[Any, Any]


# einops patterns: which axes of the token grid attend to one another; the rest is batch.
OVER = {
    "full": ("b t h w n d", "b (t h w) n d", "t"),
    "space": ("b t h w n d", "(b t) (h w) n d", "t"),
    "time": ("b t h w n d", "(b h w) t n d", "h"),
}


class GridAttention(nn.Module):
    """Self-attention over the token grid [b t h w d]: all tokens of the clip attend to one
    another. Queries and keys are RMS-normalised across all heads (as Wan does) and rotated by 3D
    rotary positions.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32
    over = "full"        # a row of OVER

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"],
                 context: MixContext) -> Float[Array, "b t h w d"]:
        width, (grid, flat, split) = x.shape[-1], OVER[self.over]
        # What is attended over must lie on one device, so the context axis splits another one
        # (for "full" XLA gathers keys and values).
        x = constrain(x, "b t h w d", context=split)
        q = RMSNorm(name="q_norm")(nn.Dense(width, name="q", dtype=self.dtype)(x))
        k = RMSNorm(name="k_norm")(nn.Dense(width, name="k", dtype=self.dtype)(x))
        v = nn.Dense(width, name="v", dtype=self.dtype)(x)
        q, k, v = (rearrange(a, "b t h w (n d) -> b t h w n d", n=self.heads) for a in (q, k, v))
        q, k, v = (constrain(a, "b t h w n d", context=split)
                   for a in (apply_rope(q, context.rope), apply_rope(k, context.rope), v))
        sizes = dict(zip("bthw", x.shape[:4], strict=True))
        q, k, v = (rearrange(a, f"{grid} -> {flat}") for a in (q, k, v))
        y = rearrange(attend(q, k, v), f"{flat} -> {grid}", **sizes)
        y = rearrange(y, "b t h w n d -> b t h w (n d)")
        y = nn.Dense(width, name="out", dtype=self.dtype)(y)
        return constrain(y, "b t h w d", context="t")


class SpaceAttention(GridAttention):
    """The tokens of one frame attend to one another."""

    over = "space"


class TimeAttention(GridAttention):
    """The tokens of one place attend to one another."""

    over = "time"


MIXERS: dict[str, Callable[..., nn.Module]] = {
    "full": GridAttention,
    "space": SpaceAttention,
    "time": TimeAttention,
}

# Names for block patterns; a config may also spell a pattern out, e.g. ("space", "full", "time").
PATTERNS: dict[str, tuple[str, ...]] = {
    "full": ("full",),
    "factorized": ("space", "time"),   # Latte, VDM: space within a frame, then time at a place
}
