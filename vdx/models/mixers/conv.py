"""The mixer that convolves the token grid."""

import math
from typing import Annotated, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.ranges import Count, OneOf
from vdx.models.convolution import PADDINGS, Conv3D, Size
from vdx.models.mixers.context import Grid, MixContext
from vdx.parallel import constrain, reshard_to_frames
from vdx.types import Array, DTypeLike, Float


class ConvMixer(nn.Module):
    """A depthwise convolution of the token grid, then a dense layer over features.

    Depthwise, because the blocks' MLPs mix features anyway (Chollet 2017; Liu et al. 2022,
    ConvNeXt). The kernel [t h w] then costs its size for a token and feature; full channels would
    cost that times the width.
    """

    heads: int  # not used
    dtype: DTypeLike = jnp.float32  # of the products
    kernel: tuple[Count, Count, Count] = (3, 3, 3)  # (t, 1, 1) works over time alone
    separable: bool = False  # space, then time: (2+1)D (Tran et al. 2018)
    causal: bool = False  # as in Conv3D
    padding: Annotated[str, OneOf(lambda: PADDINGS)] = "zeros"  # a row of PADDINGS
    crosses_frames: ClassVar[bool] = True  # as in `Mixer`
    causal_block: ClassVar[int | None] = None  # as in `Mixer`

    def __post_init__(self) -> None:
        """Check the fields as Conv3D does."""
        Conv3D(1, self.kernel, causal=self.causal, padding=self.padding, parent=None)
        super().__post_init__()

    @property
    def temporal(self) -> bool:
        """Return whether the kernel works over time alone."""
        return self.kernel[1:] == (1, 1)

    @nn.nowrap
    def kernels(self) -> dict[str, Size]:
        """Return the name and size of each convolution, in their order."""
        t, h, w = self.kernel
        if self.separable:
            return {"depthwise_space": (1, h, w), "depthwise_time": (t, 1, 1)}
        return {"depthwise": self.kernel}

    @nn.nowrap
    def flops(self, grid: Grid, width: int) -> float:
        """Return the operations of one forward pass of one clip."""
        taps = sum(math.prod(kernel) for kernel in self.kernels().values())
        return math.prod(grid) * width * 2.0 * (taps + width)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w d"], context: MixContext | None
    ) -> Float[Array, "b t h w d"]:
        """Mix tokens; the context is not used."""
        width = x.shape[-1]
        for name, kernel in self.kernels().items():
            # An axis that is convolved must be on one device, as in attention over time.
            over_time_alone = kernel[1:] == (1, 1)
            split = "h" if over_time_alone else "t"
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

        # Mix the features.
        return reshard_to_frames(nn.Dense(width, name="out", dtype=self.dtype)(x), split)
