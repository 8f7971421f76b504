"""Mixers: how the tokens of a clip exchange information. One table, one signature.

A mixer is a linen module `(heads, dtype)` that maps the token grid [b t h w d] and a
`MixContext` to a grid of the same shape. The transformer's `pattern` names rows of MIXERS.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from vdx.build import ConfigError
from vdx.models.attention import attend
from vdx.models.layers import RMSNorm, apply_rope
from vdx.parallel import constrain
from vdx.types import Array, Bool, Float


class Past(flax.struct.PyTreeNode):
    """What came before the block that a network is given alone (see vdx.generate.stream).

    start: int32 [], frames of tokens before it. blocks: how many blocks the cache of a mixer
    without a window holds.
    """

    start: Array
    blocks: int = flax.struct.field(pytree_node=False)


class MixContext(flax.struct.PyTreeNode):
    """What a mixer may need besides the tokens: rotary tables [t h w 1 d/2] (cos, sin), and the
    past of a block that comes alone."""

    rope: tuple[Any, Any]
    past: Past | None = None


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

    block: frames of tokens in a block; a token sees its own block, all of it, and those before
    (Yin et al. 2024, CausVid). window: of those before, so many are seen, and the first `sink`
    (Xiao et al. 2023); None: all. With a past the tokens are one block, and the keys and values
    of the blocks before it lie in the collection "cache"; where that is mutable, the block's own
    are put there, in place of those that no later block sees.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32
    block: int | None = None
    window: int | None = None
    sink: int = 0
    over = "full"        # a row of OVER

    def __post_init__(self):
        if not ((self.block is None or (self.block > 0 and self.over != "space"))
                and (self.window is None or (self.window > 0 and self.block))
                and (self.sink == 0 or (self.sink > 0 and self.window))):
            raise ConfigError(
                f"model.pattern: {self.over!r} with block = {self.block}, window = {self.window}, "
                f"sink = {self.sink}: a block is of one or more frames, of a mixer that looks over "
                "time; a window is of one or more blocks, and a sink stays beside a window.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"],
                 context: MixContext) -> Float[Array, "b t h w d"]:
        width, split = x.shape[-1], OVER[self.over][2]
        # What is attended over must lie on one device, so the context axis splits another one
        # (for "full" XLA gathers keys and values).
        x = constrain(x, "b t h w d", context=split)
        q = RMSNorm(name="q_norm")(nn.Dense(width, name="q", dtype=self.dtype)(x))
        k = RMSNorm(name="k_norm")(nn.Dense(width, name="k", dtype=self.dtype)(x))
        v = nn.Dense(width, name="v", dtype=self.dtype)(x)
        q, k, v = (rearrange(a, "b t h w (n d) -> b t h w n d", n=self.heads) for a in (q, k, v))
        q, k, v = (constrain(a, "b t h w n d", context=split)
                   for a in (apply_rope(q, context.rope), apply_rope(k, context.rope), v))
        if self.block is None:
            y = self.answers(q, k, v)
        elif context.past is None:
            y = self.answers_by_block(q, k, v, self.block)
        else:
            y = self.answers(q, *self.after_past(k, v, self.block, context.past))
        y = rearrange(y, "b t h w n d -> b t h w (n d)")
        y = nn.Dense(width, name="out", dtype=self.dtype)(y)
        return constrain(y, "b t h w d", context="t")

    def answers(self, q: Float[Array, "b t h w n d"], k: Float[Array, "b s h w n d"],
                v: Float[Array, "b s h w n d"], seen: Bool[Array, "s"] | None = None) -> Array:
        """seen: frames of the keys that are; None: all."""
        grid, flat, _ = OVER[self.over]
        sizes, frames = dict(zip("bthw", q.shape[:4], strict=True)), k.shape[1]
        q, k, v = (rearrange(a, f"{grid} -> {flat}") for a in (q, k, v))
        if self.block and self.over == "full":       # a block's frames may lie on one device
            q = constrain(q, "b s n d", context="s")
        mask = None if seen is None else jnp.repeat(seen, k.shape[1] // frames)[None]
        return rearrange(attend(q, k, v, mask), f"{flat} -> {grid}", **sizes)

    def answers_by_block(self, q: Array, k: Array, v: Array, size: int) -> Array:
        """Block by block, each with the keys that it sees: what is hidden is not computed."""
        out = []
        for i in range(-(-q.shape[1] // size)):
            near = 0 if self.window is None else max(0, i - self.window)
            old, new = min(self.sink, near) * size, slice(near * size, (i + 1) * size)
            seen = (jnp.concatenate([a[:, :old], a[:, new]], 1) if old else a[:, new]
                    for a in (k, v))
            out.append(self.answers(q[:, i * size:(i + 1) * size], *seen))
        return jnp.concatenate(out, 1)

    def after_past(self, k: Array, v: Array, size: int,
                   past: Past) -> tuple[Array, Array, Array]:
        """Keys and values of the past and then of this block, and which frames are seen [s]."""
        blocks = past.blocks if self.window is None else self.sink + self.window
        index, out = past.start // size, []
        slot = index if self.window is None else jnp.where(
            index < self.sink, index, self.sink + (index - self.sink) % self.window)
        for name, new in (("keys", k), ("values", v)):
            shape = (len(new), blocks * size, *new.shape[2:])
            held = self.variable("cache", name, jnp.zeros, shape, new.dtype)
            out.append(jnp.concatenate([held.value, new], 1))
            if self.is_mutable_collection("cache"):
                held.value = jax.lax.dynamic_update_slice_in_dim(held.value, new, slot * size, 1)
        # Slots fill up in order, and those of a full window all hold a block that is seen.
        frames = jnp.arange(out[0].shape[1])
        seen = (frames < past.start) | (frames >= blocks * size)
        return out[0], out[1], seen


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
