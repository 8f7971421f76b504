"""The control."""

import math

import flax.linen as nn
import jax.numpy as jnp

from vdx.models.mixers.context import MixContext
from vdx.types import Array, Float


class NoExchange(nn.Module):
    """Every token is on its own: attention in which a token sees itself alone, which is its value.
    The control that a mixer is compared with."""

    heads: int
    dtype: jnp.dtype = jnp.float32
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
