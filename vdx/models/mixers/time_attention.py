"""Attention over time."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdx.models.mixers.context import MixContext
from vdx.models.mixers.grid_attention import GridAttention, _blocks
from vdx.types import Array, Bool

MAX_RELATIVE_DISTANCE = 32  # distances in time beyond this many frames have one bias


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
