"""3D convolution: the sum itself, a layer with strides and paddings, and the mixer of a block."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdx.config.build import ConfigError
from vdx.parallel import constrain, platform, reshard_to_frames
from vdx.types import Array, DTypeLike, Float

Size = tuple[int, int, int]
PADDINGS = {"zeros": "constant", "edge": "edge"}  # as jnp.pad names them


def convolve(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "i j k _ f"],
    stride: Size = (1, 1, 1),
    space: Any = ((0, 0), (0, 0)),
) -> Float[Array, "b T H W f"]:
    """The convolution (as networks say it: no flip) of x with a kernel.

    There is no padding in time, and in space zeros, (before, after) for h and w. Depthwise, each
    feature by its own kernel [i j k 1 c], if x has more features than the kernel takes. The
    result is float32, or on accelerators, where XLA rounds a sum once, of x's type.
    """
    (taps, *size, ins, features), steps = kernel.shape, stride[0]
    frames = max(0, (x.shape[1] - taps) // steps + 1)
    if ins < x.shape[-1]:
        x = jnp.pad(x, [(0, 0), (0, 0), *space, (0, 0)])
        return _depthwise(x, kernel[..., 0, :], stride, frames)
    high, wide = (
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(x.shape[2:4], space, size, stride[1:], strict=True)
    )
    if not frames:
        return jnp.zeros((len(x), 0, high, wide, features), jnp.float32)
    if platform() != "cpu":
        return jax.lax.conv_general_dilated(
            x, kernel, stride, [(0, 0), *space], dimension_numbers=("NTHWC", "THWIO", "NTHWC")
        )
    # A sum of 2D convolutions over the taps in time: on a CPU XLA's 3D convolution takes four
    # times as long. On a TPU this moves 1.7 to 2.5 times the bytes by its compiler's account.
    # In float32, or bfloat16 would round at every tap.
    y = jnp.zeros((len(x) * frames, high, wide, features), jnp.float32)
    for i in range(taps):
        tap = x[:, i : i + steps * (frames - 1) + 1 : steps]
        y += jax.lax.conv_general_dilated(
            rearrange(tap, "b t h w c -> (b t) h w c"),
            kernel[i],
            stride[1:],
            space,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).astype(jnp.float32)
    return y.reshape(len(x), frames, *y.shape[1:])


def _depthwise(x: Array, kernel: Float[Array, "i j k c"], stride: Size, frames: int) -> Array:
    """A sum over the taps of shifted clips, which XLA makes one pass over the clip: there is no
    matrix product in it, and the grouped convolutions of XLA are slow off a GPU."""
    sizes = [frames] + [
        (n - k) // s + 1
        for n, k, s in zip(x.shape[2:4], kernel.shape[1:3], stride[1:], strict=True)
    ]
    y = jnp.zeros((len(x), *sizes, x.shape[-1]), jnp.float32)
    for tap in np.ndindex(kernel.shape[:3]):
        cut = tuple(
            slice(i, i + s * (n - 1) + 1, s) for i, n, s in zip(tap, sizes, stride, strict=True)
        )
        y += x[:, *cut].astype(jnp.float32) * kernel[tap].astype(jnp.float32)
    return y


class Conv3D(nn.Module):
    """Convolution [b t h w c] -> [b t' h' w' features], n' = ceil(n / stride) along each axis.

    causal: an output sees its frame and earlier ones; else the kernel, of odd size, is centred as
    it is in space. padding: a row of PADDINGS, what is beyond the clip and its frames: zeros, or
    the nearest pixel. depthwise: each feature by itself; `features` is then that of x.
    """

    features: int
    kernel: Size = (3, 3, 3)
    stride: Size = (1, 1, 1)
    causal: bool = False
    padding: str = "zeros"
    depthwise: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self):
        centred = self.kernel[self.causal :]
        if self.padding not in PADDINGS or min(self.kernel) < 1 or any(k % 2 == 0 for k in centred):
            raise ConfigError(
                f"A convolution of kernel = {self.kernel} (t, h, w), padding = "
                f"{self.padding!r}: sizes are odd, the first is any if it is causal; "
                f"paddings are {', '.join(PADDINGS)}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Array:
        ins = 1 if self.depthwise else x.shape[-1]
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (*self.kernel, ins, self.features),
            jnp.float32,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        around = [(k // 2, k // 2) for k in self.kernel]
        if self.causal:
            around[0] = self.kernel[0] - 1, 0
        x = jnp.pad(x, [(0, 0), *around, (0, 0)], PADDINGS[self.padding])
        return (convolve(x, kernel, self.stride) + bias).astype(self.dtype)


class ConvMixer(nn.Module):
    """Each feature of the token grid is convolved by itself, then a dense layer mixes features.

    Depthwise, because the blocks' MLPs mix features anyway (Chollet 2017; Liu et al. 2022,
    ConvNeXt): the kernel [t h w] then costs its size for a token and feature, where full channels
    would cost that times the width. separable: space, then time, (2+1)D (Tran et al. 2018).
    causal, padding: as of Conv3D. A kernel of (t, 1, 1) works over time alone.
    """

    heads: int  # not used
    dtype: DTypeLike = jnp.float32
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
