"""3D convolution: the sum itself, a layer with strides and paddings, and the mixer of a block."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vdx.models.convolution import Conv3D, Size
from vdx.parallel import constrain, reshard_to_frames
from vdx.types import Array, Float


class ConvMixer(nn.Module):
    """Each feature of the token grid is convolved by itself, then a dense layer mixes features.

    Depthwise, because the blocks' MLPs mix features anyway (Chollet 2017; Liu et al. 2022,
    ConvNeXt): the kernel [t h w] then costs its size for a token and feature, where full channels
    would cost that times the width. separable: space, then time, (2+1)D (Tran et al. 2018).
    causal, padding: as of Conv3D. A kernel of (t, 1, 1) works over time alone.
    """

    heads: int  # not used
    dtype: jnp.dtype = jnp.float32
    kernel: Size = (3, 3, 3)
    separable: bool = False
    causal: bool = False
    padding: str = "zeros"

    def __post_init__(self):
        Conv3D(1, self.kernel, causal=self.causal, padding=self.padding, parent=None)
        super().__post_init__()

    @property
    def temporal(self) -> bool:
        return self.kernel[1:] == (1, 1)

    @nn.nowrap
    def kernels(self) -> dict[str, Size]:
        """name -> size of the convolutions, one after another."""
        t, h, w = self.kernel
        return (
            {"depthwise_space": (1, h, w), "depthwise_time": (t, 1, 1)}
            if self.separable
            else {"depthwise": self.kernel}
        )

    @nn.nowrap
    def flops(self, grid: tuple[int, int, int], width: int) -> float:
        taps = sum(math.prod(kernel) for kernel in self.kernels().values())
        return math.prod(grid) * width * 2.0 * (taps + width)

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"], context: Any) -> Float[Array, "b t h w d"]:
        width = x.shape[-1]
        for name, kernel in self.kernels().items():
            # What is convolved over time alone lies on one device, as in attention over time.
            split = "h" if kernel[1:] == (1, 1) else "t"
            x = constrain(x, "b t h w d", context=split)
            x = Conv3D(
                width,
                kernel,
                causal=self.causal,
                padding=self.padding,
                depthwise=True,
                dtype=self.dtype,
                name=name,
            )(x)
            x = constrain(x, "b t h w d", context=split)
        return reshard_to_frames(nn.Dense(width, name="out", dtype=self.dtype)(x), split)
