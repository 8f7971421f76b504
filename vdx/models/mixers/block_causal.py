"""Block-causal attention: the frames that a block attends to, and their cache.

A clip is divided into blocks of frames. A token attends to its own block, all of it, and to blocks
before it (Yin et al. 2024, CausVid). With a window it attends to the last `window` of those before
and to the first `sink` blocks of the clip (Xiao et al. 2023).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vdx.models.mixers.context import CachePosition
from vdx.types import Array, Bool, Float

Frames = tuple[int, int]  # from, to


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """The blocks of a clip, and those that each block attends to."""

    size: int  # frames of tokens in a block
    window: int | None = None  # blocks before its own that a token attends to; None: all
    sink: int = 0  # first blocks of the clip that it attends to besides the window

    def blocks(self, frames: int) -> list[Frames]:
        """Return the frames of each block; the last block may be shorter."""
        starts = range(0, frames, self.size)
        return [(start, min(start + self.size, frames)) for start in starts]

    def visible_frames(self, index: int, frames: int) -> list[Frames]:
        """Return the ranges of frames that the block number `index` attends to."""
        first = 0
        if self.window is not None:
            first = max(0, index - self.window)
        near = (first * self.size, min((index + 1) * self.size, frames))

        sink = min(self.sink, first) * self.size
        return [(0, sink), near] if sink else [near]

    def num_visible(self, frames: int) -> int:
        """Return the number of pairs of frames of which the first attends to the second."""
        pairs = 0
        for i, (start, stop) in enumerate(self.blocks(frames)):
            visible = sum(to - at for at, to in self.visible_frames(i, frames))
            pairs += (stop - start) * visible
        return pairs

    def mask(self, frames: int) -> Bool[np.ndarray, "q s"]:
        """Return True where frame q attends to frame s."""
        mask = np.zeros((frames, frames), bool)
        for i, (start, stop) in enumerate(self.blocks(frames)):
            for at, to in self.visible_frames(i, frames):
                mask[start:stop, at:to] = True
        return mask

    def cached_blocks(self, past: CachePosition) -> int:
        """Return the blocks that a cache holds."""
        return past.blocks if self.window is None else self.sink + self.window

    def cache_slot(self, index: Array) -> Array:
        """Return the slot of the cache for the block number `index`.

        The sink has the first slots. In the window a block replaces the oldest one.
        """
        if self.window is None:
            return index
        return jnp.where(index < self.sink, index, self.sink + (index - self.sink) % self.window)


class CachedKeys(NamedTuple):
    """Keys and values of the blocks before, then those of the current block."""

    keys: Float[Array, "b s h w n d"]
    values: Float[Array, "b s h w n d"]
    visible: Bool[Array, "s"]  # False on slots that are still empty


def visible_in_cache(layout: BlockLayout, past: CachePosition, num_frames: int) -> Bool[Array, "s"]:
    """Return True on the visible frames of the cache and of the current block.

    Cached frames are visible once they are filled. Slots are filled in order, and every slot of a
    full window holds a visible block.

    Args:
        layout: the blocks.
        past: the position of the current block.
        num_frames: frames of the cache and of the current block.
    """
    frames = jnp.arange(num_frames)
    return (frames < past.start) | (frames >= layout.cached_blocks(past) * layout.size)


def attend_by_block(
    attend: Callable[[Array, Array, Array], Array],
    layout: BlockLayout,
    q: Float[Array, "b t h w n d"],
    k: Float[Array, "b t h w n d"],
    v: Float[Array, "b t h w n d"],
) -> Float[Array, "b t h w n d"]:
    """Attend block by block, each to its visible frames.

    Hidden scores are not computed.
    """
    frames = q.shape[1]
    out = []
    for i, (start, stop) in enumerate(layout.blocks(frames)):
        ranges = layout.visible_frames(i, frames)
        keys, values = (jnp.concatenate([a[:, at:to] for at, to in ranges], 1) for a in (k, v))
        out.append(attend(q[:, start:stop], keys, values))
    return jnp.concatenate(out, 1)
