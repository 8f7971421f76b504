"""Mixers: how the tokens of a clip exchange information. One table, one signature.

A mixer is a linen module `(heads, dtype, **fields)` that maps the token grid [b t h w d] and a
`MixContext` to a grid of the same shape. The transformer's `pattern` names rows of MIXERS. Each
says of itself:
  temporal  whether it works over time alone: an image, a clip of one frame, passes by its block
  flops     (grid (t, h, w), width) -> floating-point operations of its matrix products and
            convolutions in one forward pass of one clip, two to a multiply-add
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdx.config.build import ConfigError
from vdx.models.attention.backends import attend
from vdx.models.layers import RMSNorm, apply_rope
from vdx.models.mixers.conv import ConvMixer
from vdx.models.mixers.recurrent import Recurrent
from vdx.parallel import constrain, reshard_to_frames
from vdx.types import Array, Bool, DTypeLike, Float


class CachePosition(flax.struct.PyTreeNode):
    """What came before the block that a network is given alone (see vdx.generate.blockwise).

    start: int32 [], frames of tokens before it. blocks: how many blocks the cache of a mixer
    without a window holds.
    """

    start: Array
    blocks: int = flax.struct.field(pytree_node=False)


class MixContext(flax.struct.PyTreeNode):
    """What a mixer may need besides the tokens: rotary tables [t h w 1 d/2] (cos, sin), the past
    of a block that comes alone, and the backend of attention and how "full" attention meets keys
    on other devices (see attend)."""

    rope: tuple[Any, Any]
    past: CachePosition | None = None
    attention: str = flax.struct.field(pytree_node=False, default="auto")
    across: str = flax.struct.field(pytree_node=False, default="gather")


# einops patterns: which axes of the token grid attend to one another; the rest is batch. Then the
# number of tokens that each one sees.
ATTENTION_AXES: dict[str, tuple[str, str, str, Callable[[int, int, int], int]]] = {
    "full": ("b t h w n d", "b (t h w) n d", "t", lambda t, h, w: t * h * w),
    "space": ("b t h w n d", "b t (h w) n d", "t", lambda t, h, w: h * w),
    "time": ("b t h w n d", "b h w t n d", "h", lambda t, h, w: t),
}
MAX_RELATIVE_DISTANCE = 32  # distances in time beyond this many frames have one bias


class GridAttention(nn.Module):
    """Self-attention over the token grid [b t h w d]: all tokens of the clip attend to one
    another.

    positions: "rope", 3D rotary positions, or "none". qk_norm: queries and keys are
    RMS-normalised across all heads (as Wan does).
    block: frames of tokens in a block; a token sees its own block, all of it, and those before
    (Yin et al. 2024, CausVid). window: of those before, so many are seen, and the first `sink`
    (Xiao et al. 2023); None: all. With a past the tokens are one block, and the keys and values
    of the blocks before it lie in the collection "cache"; where that is mutable, the block's own
    are put there, in place of those that no later block sees.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    positions: str = "rope"
    qk_norm: bool = True
    block: int | None = None
    window: int | None = None
    sink: int = 0
    over = "full"  # a row of OVER
    temporal = False
    known_positions: ClassVar[tuple[str, ...]] = ("rope", "none")

    def __post_init__(self):
        if self.positions not in self.known_positions:
            raise ConfigError(
                f"model.pattern: positions = {self.positions!r} of the mixer over "
                f"{self.over!r}; known: {', '.join(self.known_positions)}."
            )
        if not (
            (self.block is None or (self.block > 0 and self.over != "space"))
            and (self.window is None or (self.window > 0 and (self.block or self.temporal)))
            and (self.sink == 0 or (self.sink > 0 and self.block and self.window))
        ):
            raise ConfigError(
                f"model.pattern: {self.over!r} with block = {self.block}, window = {self.window}, "
                f"sink = {self.sink}: a block is of one or more frames, of a mixer that looks over "
                "time; a window is of one or more blocks, and a sink stays beside a window."
            )
        super().__post_init__()

    @nn.nowrap
    def flops(self, grid: tuple[int, int, int], width: int) -> float:
        t, whole = grid[0], ATTENTION_AXES[self.over][3](*grid)
        seen = (
            whole
            if self.block is None
            else whole
            / t**2
            * sum(
                (stop - start) * sum(b - a for a, b in self.seen(i, t))
                for i, (start, stop) in enumerate(_blocks(t, self.block))
            )
        )
        return math.prod(grid) * width * (8.0 * width + 4.0 * seen)

    @nn.nowrap
    def seen(self, index: int, frames: int) -> list[tuple[int, int]]:
        """Frames (from, to) that the block number `index` sees."""
        assert self.block is not None
        near = 0 if self.window is None else max(0, index - self.window)
        old = min(self.sink, near) * self.block
        now = near * self.block, min((index + 1) * self.block, frames)
        return [(0, old), now] if old else [now]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w d"], context: MixContext
    ) -> Float[Array, "b t h w d"]:
        width, split = x.shape[-1], ATTENTION_AXES[self.over][2]
        # What is attended over must lie on one device, so the context axis splits another one
        # (for "full" see CONTEXTS in attend.py).
        x = constrain(x, "b t h w d", context=split)
        q, k, v = (nn.Dense(width, name=name, dtype=self.dtype)(x) for name in "qkv")
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        q, k, v = (rearrange(a, "b t h w (n d) -> b t h w n d", n=self.heads) for a in (q, k, v))
        if self.positions == "rope":
            q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        q, k, v = (constrain(a, "b t h w n d", context=split) for a in (q, k, v))
        if self.block is None or context.past is None:
            y = self.within(context, q, k, v)
        else:
            y = self.answers(context, q, *self.append_to_cache(k, v, self.block, context.past))
        y = rearrange(y, "b t h w n d -> b t h w (n d)")
        y = nn.Dense(width, name="out", dtype=self.dtype)(y)
        return reshard_to_frames(y, split)

    def answers(
        self,
        context: MixContext,
        q: Float[Array, "b t h w n d"],
        k: Float[Array, "b s h w n d"],
        v: Float[Array, "b s h w n d"],
        seen: Array | None = None,
        bias: Float[Array, "1 n q s"] | None = None,
    ) -> Array:
        """seen: bool [s], frames of the keys that are, or for "time" [q s]; None: all."""
        grid, flat = ATTENTION_AXES[self.over][:2]
        sizes, frames = dict(zip("bthw", q.shape[:4], strict=True)), k.shape[1]
        q, k, v = (rearrange(a, f"{grid} -> {flat}") for a in (q, k, v))
        if self.block and self.over == "full":  # a block's frames may lie on one device
            q = constrain(q, "b s n d", context="s")
        mask = None if seen is None else jnp.repeat(seen, k.shape[-3] // frames, -1)[None]
        across = context.across if self.over == "full" and self.block is None else "gather"
        y = attend(q, k, v, mask, bias=bias, backend=context.attention, context=across)
        return rearrange(y, f"{flat} -> {grid}", **sizes)

    def within(self, context: MixContext, q: Array, k: Array, v: Array) -> Array:
        """All of a clip; block by block, each with the keys that it sees: what is hidden is not
        computed."""
        if self.block is None:
            return self.answers(context, q, k, v)
        out, frames = [], q.shape[1]
        for i, (start, stop) in enumerate(_blocks(frames, self.block)):
            seen = (
                jnp.concatenate([a[:, at:to] for at, to in self.seen(i, frames)], 1) for a in (k, v)
            )
            out.append(self.answers(context, q[:, start:stop], *seen))
        return jnp.concatenate(out, 1)

    def append_to_cache(
        self, k: Array, v: Array, size: int, past: CachePosition
    ) -> tuple[Array, Array, Array]:
        """Keys and values of the past and then of this block, and which frames are seen [s]."""
        blocks = past.blocks if self.window is None else self.sink + self.window
        index, out = past.start // size, []
        slot = (
            index
            if self.window is None
            else jnp.where(index < self.sink, index, self.sink + (index - self.sink) % self.window)
        )
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


def _blocks(frames: int, size: int) -> list[tuple[int, int]]:
    """Frames (from, to) of each block."""
    return [(i, min(i + size, frames)) for i in range(0, frames, size)]


class SpaceAttention(GridAttention):
    """The tokens of one frame attend to one another."""

    over = "space"


class TimeAttention(GridAttention):
    """The tokens of one place attend to one another.

    block: 1 is causal. window: without blocks, those at most so many frames away are seen.
    positions: also "relative", a learned bias for each head and each distance in frames (Shaw et
    al. 2018; as scores, Raffel et al. 2020), the same beyond REACH. The number of frames may
    differ between training and use.
    """

    over = "time"
    temporal = True
    known_positions = ("rope", "relative", "none")

    @nn.nowrap
    def flops(self, grid: tuple[int, int, int], width: int) -> float:
        return math.prod(grid) * width * (8.0 * width + 4.0 * grid[0])  # what is hidden as well

    def within(self, context: MixContext, q: Array, k: Array, v: Array) -> Array:
        """One product with a mask: so few tokens are not worth a program for each block."""
        frames, bias = q.shape[1], None
        if self.positions == "relative":
            table = self.param(
                "distance_table",
                nn.initializers.normal(0.02),
                (2 * MAX_RELATIVE_DISTANCE + 1, self.heads),
                jnp.float32,
            )
            rows = table[
                np.clip(_ahead(frames), -MAX_RELATIVE_DISTANCE, MAX_RELATIVE_DISTANCE)
                + MAX_RELATIVE_DISTANCE
            ]
            bias = rearrange(rows, "q s n -> 1 n q s")
        return self.answers(context, q, k, v, self.mask(frames), bias)

    @nn.nowrap
    def mask(self, frames: int) -> Bool[Array, "q s"] | None:
        """True on what each frame may see; None: all."""
        if self.block is None:
            return None if self.window is None else jnp.asarray(abs(_ahead(frames)) <= self.window)
        mask = np.zeros((frames, frames), bool)
        for i, (start, stop) in enumerate(_blocks(frames, self.block)):
            for at, to in self.seen(i, frames):
                mask[start:stop, at:to] = True
        return jnp.asarray(mask)


def _ahead(frames: int) -> np.ndarray:
    """[q s]: by how many frames the key is ahead of the query."""
    return np.arange(frames) - np.arange(frames)[:, None]


class NoExchange(nn.Module):
    """Every token is on its own: attention in which a token sees itself alone, which is its value.
    The control that a mixer is compared with."""

    heads: int
    dtype: DTypeLike = jnp.float32
    over = "none"
    temporal = False  # so that the frames of a clip are as many images

    @nn.nowrap
    def flops(self, grid: tuple[int, int, int], width: int) -> float:
        return math.prod(grid) * 4.0 * width**2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w d"], context: MixContext
    ) -> Float[Array, "b t h w d"]:
        v = nn.Dense(x.shape[-1], name="v", dtype=self.dtype)(x)
        return nn.Dense(x.shape[-1], name="out", dtype=self.dtype)(v)


MIXERS: dict[str, Callable[..., Any]] = {
    "full": GridAttention,
    "space": SpaceAttention,
    "time": TimeAttention,
    "conv": ConvMixer,
    "recurrent": Recurrent,
    "none": NoExchange,
}

# Names for block patterns; a config may also spell a pattern out, with names or specs
# {"name": row of MIXERS, **fields}, e.g. ("space", "full", {"name": "time", "block": 1}).
PATTERNS: dict[str, tuple[str | dict[str, Any], ...]] = {
    "full": ("full",),
    "factorized": ("space", "time"),  # Latte, VDM: space within a frame, then time at a place
    "factorized_causal": ("space", {"name": "time", "block": 1}),
    "conv": ("space", {"name": "conv", "kernel": (3, 1, 1)}),
    "recurrent": ("space", "recurrent"),
    "latte": tuple(
        {"name": name, "positions": "none", "qk_norm": False} for name in ("space", "time")
    ),  # its `sincos` positions are added
    "frames": ("space", "none"),  # independent frames
}
