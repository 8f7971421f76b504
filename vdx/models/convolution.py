"""3D convolution: the sum itself, and a layer with strides and paddings."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdx.config.build import ConfigError
from vdx.models.layers import along_last
from vdx.parallel import platform
from vdx.types import Array, DTypeLike, Float

Size = tuple[int, int, int]  # frames, rows and columns
Padding = Sequence[tuple[int, int]]  # (before, after) of rows and of columns

# What surrounds a clip; the values are modes of jnp.pad.
PADDINGS = {
    "zeros": "constant",
    "edge": "edge",  # the nearest pixel
}


def convolve(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "i j k e f"],
    stride: Size = (1, 1, 1),
    space: Padding = ((0, 0), (0, 0)),
) -> Float[Array, "b T H W f"]:
    """Convolve x with a kernel (as networks define it: without a flip).

    There is no padding in time. Rows and columns are padded with zeros, `space` of them. If x has
    more features than the kernel reads, the sum is depthwise: each feature has its own kernel
    [i j k 1 c].

    The result is float32. On accelerators, where XLA rounds a sum once, it has the type of x.
    """
    taps, _, _, features_in, features = kernel.shape
    frames = max(0, (x.shape[1] - taps) // stride[0] + 1)

    # Each feature has its own kernel.
    if features_in < x.shape[-1]:
        x = jnp.pad(x, [(0, 0), (0, 0), *space, (0, 0)])
        return _depthwise(x, kernel[..., 0, :], stride, frames)

    # Fewer frames than the kernel has.
    if frames == 0:
        height, width = _sizes_in_space(x, kernel, stride, space)
        return jnp.zeros((len(x), 0, height, width, features), jnp.float32)

    # The faster form of the platform.
    if platform() == "cpu":
        return _sum_over_taps(x, kernel, stride, space, frames)
    return jax.lax.conv_general_dilated(
        x, kernel, stride, [(0, 0), *space], dimension_numbers=("NTHWC", "THWIO", "NTHWC")
    )


def _sizes_in_space(x: Array, kernel: Array, stride: Size, space: Padding) -> tuple[int, int]:
    """Return the rows and columns of a convolution."""
    height, width = (
        (n + sum(pad) - k) // s + 1
        for n, pad, k, s in zip(x.shape[2:4], space, kernel.shape[1:3], stride[1:], strict=True)
    )
    return height, width


def _sum_over_taps(
    x: Array, kernel: Array, stride: Size, space: Padding, frames: int
) -> Float[Array, "b T H W f"]:
    """Sum 2D convolutions over the taps in time.

    On a CPU XLA's 3D convolution takes four times as long. On a TPU this sum moves 1.7 to 2.5
    times the bytes, by its compiler's account. The sum is float32: bfloat16 would round at every
    tap.
    """
    height, width = _sizes_in_space(x, kernel, stride, space)

    # Frames are part of the batch of each 2D convolution.
    y = jnp.zeros((len(x) * frames, height, width, kernel.shape[-1]), jnp.float32)
    for i in range(kernel.shape[0]):
        tap = x[:, i : i + stride[0] * (frames - 1) + 1 : stride[0]]
        y += jax.lax.conv_general_dilated(
            rearrange(tap, "b t h w c -> (b t) h w c"),
            kernel[i],
            stride[1:],
            space,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).astype(jnp.float32)
    return y.reshape(len(x), frames, *y.shape[1:])


def _depthwise(
    x: Float[Array, "b t h w c"], kernel: Float[Array, "i j k c"], stride: Size, frames: int
) -> Float[Array, "b T H W c"]:
    """Sum shifted clips over the taps, which XLA fuses into one pass over the clip.

    The sum has no matrix product, and the grouped convolutions of XLA are slow off a GPU.
    """
    height, width = _sizes_in_space(x, kernel, stride, ((0, 0), (0, 0)))
    sizes = (frames, height, width)

    y = jnp.zeros((len(x), *sizes, x.shape[-1]), jnp.float32)
    for tap in np.ndindex(kernel.shape[:3]):
        shifted = tuple(
            slice(i, i + s * (n - 1) + 1, s) for i, n, s in zip(tap, sizes, stride, strict=True)
        )
        weights = kernel[tap].astype(jnp.float32)
        y += x[:, *shifted].astype(jnp.float32) * along_last(weights, x)
    return y


class Conv3D(nn.Module):
    """Convolution of a clip, with n' = ceil(n / stride) outputs along an axis of n."""

    features: int  # of the output; with `depthwise` those of the input
    kernel: Size = (3, 3, 3)
    stride: Size = (1, 1, 1)
    # An output reads its frame and earlier ones. Otherwise the kernel, of odd size, is centred in
    # time as it is in space.
    causal: bool = False
    padding: str = "zeros"  # a row of PADDINGS
    depthwise: bool = False  # convolve each feature by itself
    dtype: DTypeLike = jnp.float32  # of the products

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: the kernel has an even size along a centred axis, or the padding is not a
                row of PADDINGS.
        """
        centred = self.kernel[1:] if self.causal else self.kernel
        even = any(k % 2 == 0 for k in centred)
        if self.padding not in PADDINGS or min(self.kernel) < 1 or even:
            raise ConfigError(
                f"A convolution of kernel = {self.kernel} (t, h, w), padding = "
                f"{self.padding!r}: sizes are odd, the first is any if it is causal; "
                f"paddings are {', '.join(PADDINGS)}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b T H W f"]:
        """Convolve a clip and add a bias."""
        features_in = 1 if self.depthwise else x.shape[-1]
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (*self.kernel, features_in, self.features),
            jnp.float32,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel = kernel.astype(self.dtype)
        x = x.astype(self.dtype)

        around = [(k // 2, k // 2) for k in self.kernel]
        if self.causal:
            around[0] = (self.kernel[0] - 1, 0)
        x = jnp.pad(x, [(0, 0), *around, (0, 0)], PADDINGS[self.padding])

        y = convolve(x, kernel, self.stride)
        return (y + along_last(bias, y)).astype(self.dtype)
