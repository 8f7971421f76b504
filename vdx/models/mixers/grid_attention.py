"""Self-attention over the token grid: between all tokens, or within each frame."""

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdx.config.build import ConfigError
from vdx.config.ranges import Count, Index
from vdx.models.attention.backends import attend
from vdx.models.layers import RMSNorm
from vdx.models.mixers.block_causal import (
    BlockLayout,
    CachedKeys,
    attend_by_block,
    visible_in_cache,
)
from vdx.models.mixers.context import CachePosition, Grid, MixContext
from vdx.models.positions import apply_rope
from vdx.parallel import constrain, reshard_to_frames
from vdx.types import Array, Bool, DTypeLike, Float


class AttentionAxes(NamedTuple):
    """The axes of the token grid [b t h w n d] that attend to one another."""

    flat: str  # einops pattern that joins them; the other axes are batch
    split: str  # the letter that the mesh axis `context` splits
    visible: Callable[[int, int, int], int]  # tokens that each token of a grid attends to


# The attended axis must be on one device, so the mesh axis `context` splits another one. ("full"
# is the exception: see CONTEXTS in vdx.models.attention.backends.)
ATTENTION_AXES: dict[str, AttentionAxes] = {
    "full": AttentionAxes("b (t h w) n d", "t", lambda t, h, w: t * h * w),
    "space": AttentionAxes("b t (h w) n d", "t", lambda t, h, w: h * w),
    "time": AttentionAxes("b h w t n d", "h", lambda t, h, w: t),
}


def attend_over(
    axes: str,
    context: MixContext,
    q: Float[Array, "b t h w n d"],
    k: Float[Array, "b s h w n d"],
    v: Float[Array, "b s h w n d"],
    visible: Bool[Array, "s"] | Bool[Array, "t s"] | None = None,
    bias: Float[Array, "1 n t s"] | None = None,
    *,
    by_block: bool = False,
) -> Float[Array, "b t h w n d"]:
    """Attend over axes of the token grid.

    Args:
        axes: a row of ATTENTION_AXES.
        context: its backend and its way to meet keys on other devices.
        q, k, v: queries, keys and values.
        visible: frames of the keys that all queries attend to [s] or, over time, that each does
            [t s]; None: all.
        bias: added to the scores, over time.
        by_block: the queries are one block of a clip.
    """
    grid = "b t h w n d"
    flat = ATTENTION_AXES[axes].flat
    sizes = dict(zip("bthw", q.shape[:4], strict=True))
    frames = k.shape[1]
    q, k, v = (rearrange(a, f"{grid} -> {flat}") for a in (q, k, v))

    # Queries that attend to all tokens of a clip may be split over devices by any token. Those of
    # a block are split here, because the frames of a block may all be on one device.
    between_devices = "gather"
    if axes == "full" and by_block:
        q = constrain(q, "b s n d", context="s")
    elif axes == "full":
        between_devices = context.context_parallel

    mask = None
    if visible is not None:
        mask = jnp.repeat(visible, k.shape[-3] // frames, -1)[None]  # frames -> keys
    y = attend(q, k, v, mask, bias=bias, backend=context.attention, context=between_devices)
    return rearrange(y, f"{flat} -> {grid}", **sizes)


class GridAttention(nn.Module):
    """Self-attention between all tokens of the clip.

    With a past in the context, the tokens are one block of a clip. The keys and values of the
    blocks before it are in the collection "cache". Where that is mutable, those of the block itself
    are written to it, in place of a block that no later one attends to.
    """

    heads: int  # of attention
    dtype: DTypeLike = jnp.float32  # of the matrix products
    positions: str = "rope"  # 3D rotary positions, or "none"
    qk_norm: bool = True  # RMS-normalise queries and keys across all heads (as Wan does)
    # The fields of BlockLayout:
    block: Count | None = None  # frames of tokens in a block; None: there are no blocks
    window: Count | None = None  # blocks before its own that a token attends to; None: all
    sink: Index = 0  # first blocks of the clip that it attends to besides the window
    axes: ClassVar[str] = "full"  # a row of ATTENTION_AXES
    temporal: ClassVar[bool] = False  # as in `Mixer`
    crosses_frames: ClassVar[bool] = True  # as in `Mixer`
    known_positions: ClassVar[tuple[str, ...]] = ("rope", "none")  # values of `positions`

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: the positions are unknown, or block, window and sink do not fit together.
        """
        if self.positions not in self.known_positions:
            raise ConfigError(
                f"model.pattern: positions = {self.positions!r} of the mixer over "
                f"{self.axes!r}; known: {', '.join(self.known_positions)}."
            )
        if not self._blocks_fit():
            raise ConfigError(
                f"model.pattern: {self.axes!r} with block = {self.block}, window = {self.window}, "
                f"sink = {self.sink}: a block is of one or more frames, of a mixer that attends "
                "over time; a window is of one or more blocks, and a sink needs a window."
            )
        super().__post_init__()

    @nn.nowrap
    def _blocks_fit(self) -> bool:
        """Return whether block, window and sink fit together."""
        block_fits = self.block is None or (self.block > 0 and self.axes != "space")
        window_fits = self.window is None or (
            self.window > 0 and (self.block is not None or self.temporal)
        )
        sink_fits = self.sink == 0 or (
            self.sink > 0 and self.block is not None and self.window is not None
        )
        return block_fits and window_fits and sink_fits

    @property
    def causal_block(self) -> int | None:
        """Return the frames of a block, if a clip can be made block by block with a cache."""
        return self.block

    @property
    def layout(self) -> BlockLayout | None:
        """Return the blocks of a clip, or None without blocks."""
        if self.block is None:
            return None
        return BlockLayout(self.block, self.window, self.sink)

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> float:
        """Return the operations of one forward pass of one clip, hidden scores excluded."""
        frames = grid[0]
        visible: float = ATTENTION_AXES[self.axes].visible(*grid)
        if self.layout is not None:
            visible = visible / frames**2 * self.layout.num_visible(frames)
        return math.prod(grid) * width * (8.0 * width + 4.0 * visible)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w d"], context: MixContext
    ) -> Float[Array, "b t h w d"]:
        """Mix tokens by attention."""
        split = ATTENTION_AXES[self.axes].split
        q, k, v = self.queries_keys_values(x, context, split)  # b t h w n d

        if self.layout is None or context.past is None:
            y = self.full_clip(context, q, k, v)
        else:
            cached = self.append_to_cache(self.layout, context.past, k, v)
            y = attend_over(
                self.axes, context, q, cached.keys, cached.values, cached.visible, by_block=True
            )

        y = rearrange(y, "b t h w n d -> b t h w (n d)")
        y = nn.Dense(x.shape[-1], name="out", dtype=self.dtype)(y)
        return reshard_to_frames(y, split)

    def queries_keys_values(
        self, x: Float[Array, "b t h w d"], context: MixContext, split: str
    ) -> tuple[Float[Array, "b t h w n e"], ...]:
        """Project tokens to heads, with norms and rotary positions."""
        width = x.shape[-1]
        x = constrain(x, "b t h w d", context=split)
        q, k, v = (nn.Dense(width, name=name, dtype=self.dtype)(x) for name in "qkv")
        if self.qk_norm:
            q = RMSNorm(name="q_norm")(q)
            k = RMSNorm(name="k_norm")(k)

        q, k, v = (rearrange(a, "b t h w (n d) -> b t h w n d", n=self.heads) for a in (q, k, v))
        if self.positions == "rope":
            q = apply_rope(q, context.rope)
            k = apply_rope(k, context.rope)
        q, k, v = (constrain(a, "b t h w n d", context=split) for a in (q, k, v))
        return q, k, v

    def full_clip(
        self,
        context: MixContext,
        q: Float[Array, "b t h w n d"],
        k: Float[Array, "b t h w n d"],
        v: Float[Array, "b t h w n d"],
    ) -> Float[Array, "b t h w n d"]:
        """Attend within a whole clip."""
        if self.layout is None:
            return attend_over(self.axes, context, q, k, v)
        attend_block = partial(attend_over, self.axes, context, by_block=True)
        return attend_by_block(attend_block, self.layout, q, k, v)

    def append_to_cache(
        self,
        layout: BlockLayout,
        past: CachePosition,
        k: Float[Array, "b t h w n d"],
        v: Float[Array, "b t h w n d"],
    ) -> CachedKeys:
        """Append a block to the blocks in the cache, and write it there if it is mutable."""
        frames = layout.cached_blocks(past) * layout.size
        start = layout.cache_slot(past.start // layout.size) * layout.size

        joined = []
        for name, block in (("keys", k), ("values", v)):
            shape = (len(block), frames, *block.shape[2:])
            cached = self.variable("cache", name, jnp.zeros, shape, block.dtype)
            joined.append(jnp.concatenate([cached.value, block], 1))
            if self.is_mutable_collection("cache"):
                cached.value = jax.lax.dynamic_update_slice_in_dim(cached.value, block, start, 1)
        keys, values = joined
        return CachedKeys(keys, values, visible_in_cache(layout, past, keys.shape[1]))


class SpaceAttention(GridAttention):
    """Self-attention between the tokens of one frame."""

    axes = "space"
    crosses_frames = False
