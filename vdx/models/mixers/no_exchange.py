"""The mixer without exchange: the control that other mixers are compared with."""

import math
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vdx.models.mixers.context import Grid, MixContext
from vdx.types import Array, DTypeLike, Float


class NoExchange(nn.Module):
    """Attention in which a token attends to itself alone, and so returns its value."""

    heads: int  # not used
    dtype: DTypeLike = jnp.float32  # of the matrix products
    temporal: ClassVar[bool] = False  # so that the frames of a clip are independent images
    crosses_frames: ClassVar[bool] = False  # as in `Mixer`
    causal_block: ClassVar[int | None] = None  # as in `Mixer`

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> float:
        """Return the operations of one forward pass of one clip."""
        return math.prod(grid) * 4.0 * width**2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w d"], context: MixContext
    ) -> Float[Array, "b t h w d"]:
        """Map each token by the dense layers of attention; the context is not used."""
        v = nn.Dense(x.shape[-1], name="v", dtype=self.dtype)(x)
        return nn.Dense(x.shape[-1], name="out", dtype=self.dtype)(v)
