"""Self-attention over time: between the tokens of one place."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdx.models.mixers.context import Grid, MixContext
from vdx.models.mixers.grid_attention import GridAttention, attend_over
from vdx.types import Array, Bool, Float

MAX_RELATIVE_DISTANCE = 32  # frames; larger distances share one bias


class TimeAttention(GridAttention):
    """Self-attention between the tokens of one place.

    block: 1 is causal. window: without blocks it counts frames, and a token attends to those at
    most so far away. positions: also "relative", a learned bias for each head and each distance in
    frames (Shaw et al. 2018; added to the scores, Raffel et al. 2020), the same beyond
    MAX_RELATIVE_DISTANCE. The number of frames may differ between training and use.
    """

    axes = "time"
    temporal = True
    known_positions = ("rope", "relative", "none")

    @property
    def causal_block(self) -> int | None:
        """Return the frames of a block.

        It is None with biases of distances, which no cache keeps.
        """
        return None if self.positions == "relative" else self.block

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> float:
        """Return the operations of one forward pass of one clip; hidden scores count too."""
        return math.prod(grid) * width * (8.0 * width + 4.0 * grid[0])

    def full_clip(
        self,
        context: MixContext,
        q: Float[Array, "b t h w n d"],
        k: Float[Array, "b t h w n d"],
        v: Float[Array, "b t h w n d"],
    ) -> Float[Array, "b t h w n d"]:
        """Attend by one product with a mask.

        Keys are few, so that a program for each block would not pay.
        """
        frames = q.shape[1]
        bias = None
        if self.positions == "relative":
            bias = self.distance_bias(frames)
        return attend_over(self.axes, context, q, k, v, self.mask(frames), bias)

    def distance_bias(self, frames: int) -> Float[Array, "1 n q s"]:
        """Return the learned bias of each pair of frames."""
        table = self.param(
            "distance_table",
            nn.initializers.normal(0.02),
            (2 * MAX_RELATIVE_DISTANCE + 1, self.heads),
            jnp.float32,
        )
        distances = frame_distances(frames)
        distances = np.clip(distances, -MAX_RELATIVE_DISTANCE, MAX_RELATIVE_DISTANCE)
        return rearrange(table[distances + MAX_RELATIVE_DISTANCE], "q s n -> 1 n q s")

    @nn.nowrap
    def mask(self, frames: int) -> Bool[Array, "q s"] | None:
        """Return True where frame q attends to frame s; None: everywhere."""
        if self.layout is not None:
            return jnp.asarray(self.layout.mask(frames))
        if self.window is not None:
            return jnp.asarray(abs(frame_distances(frames)) <= self.window)
        return None


def frame_distances(frames: int) -> np.ndarray:
    """Return the distances [q s] from query to key in frames, positive if it is later."""
    return np.arange(frames)[None] - np.arange(frames)[:, None]
