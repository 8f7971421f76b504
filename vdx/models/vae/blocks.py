"""Layers of the video autoencoders: causal convolutions, resampling.

Everything is causal in time: a frame is computed from itself and earlier frames. A clip may
therefore be processed in pieces. Each convolution leaves its last input frames to the next piece
in the flax collection "history". `first` marks the piece that starts the clip; the frames before
it are zero.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from vdx.models.attention.backends import attend
from vdx.models.convolution import convolve
from vdx.models.image_blocks import down_conv, split_space, upsample_nearest
from vdx.models.layers import RMSNorm
from vdx.types import Array, DTypeLike, Float

# Wan divides by max(|x|, 1e-12) over the channels; with this its norm is our RMSNorm.
NORM_EPS = 1e-24


class CausalConv3d(nn.Module):
    """A 3D convolution, zero-padded in space and before the clip.

    With `stride` 2 (in time) there is no padding in time: output i sees frames 2i .. 2i + 2.
    """

    features: int  # channels of the output
    kernel: tuple[int, int, int] = (3, 3, 3)  # frames, rows, columns
    stride: int = 1  # in time
    dtype: DTypeLike = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s h w f"]:
        """Convolve one piece of a clip."""
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (*self.kernel, x.shape[-1], self.features),
            jnp.float32,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x = self._with_history(x.astype(self.dtype), first)

        _, rows, columns = self.kernel
        space = ((rows // 2, rows // 2), (columns // 2, columns // 2))
        y = convolve(x, kernel.astype(self.dtype), (self.stride, 1, 1), space)
        y = y + jnp.broadcast_to(bias, y.shape)
        return y.astype(self.dtype)

    def _with_history(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s h w c"]:
        """Prepend the frames before this piece, and keep its last ones for the next piece."""
        overlap = self.kernel[0] - self.stride
        if first:
            padding = overlap if self.stride == 1 else 0
            past = jnp.zeros((len(x), padding, *x.shape[2:]), x.dtype)
        else:
            past = self.get_variable("history", "frames")
        x = jnp.concatenate([past, x], 1)

        if self.is_mutable_collection("history") and not self.is_initializing():
            self.put_variable("history", "frames", x[:, x.shape[1] - overlap :])
        return x


def attend_frames(
    q: Float[Array, "b t h w d"], k: Float[Array, "b t h w d"], v: Float[Array, "b t h w d"]
) -> Float[Array, "b t h w d"]:
    """Attend between the positions of each frame, with one head."""
    q_flat, k_flat, v_flat = (rearrange(a, "b t h w d -> b t (h w) 1 d") for a in (q, k, v))
    return attend(q_flat, k_flat, v_flat).reshape(q.shape)


class FrameAttention(nn.Module):
    """A residual of self-attention within each frame, with one head."""

    dtype: DTypeLike = jnp.float32  # of the matrix products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """Apply the layer."""
        width = x.shape[-1]
        y = RMSNorm(NORM_EPS, name="norm")(x)
        qkv = nn.Dense(3 * width, name="qkv", dtype=self.dtype)(y)
        y = attend_frames(*jnp.split(qkv, 3, -1))
        return split_space(x + nn.Dense(width, name="out", dtype=self.dtype)(y))


class ResidualBlock(nn.Module):
    """Two causal convolutions, each after norm and SiLU, plus a shortcut."""

    features: int  # channels of the output
    dtype: DTypeLike = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t h w f"]:
        """Apply the block to one piece of a clip."""
        y = nn.silu(RMSNorm(NORM_EPS, name="norm1")(x))
        y = CausalConv3d(self.features, dtype=self.dtype, name="conv1")(y, first)
        y = nn.silu(RMSNorm(NORM_EPS, name="norm2")(y))
        y = CausalConv3d(self.features, dtype=self.dtype, name="conv2")(y, first)

        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="shortcut", dtype=self.dtype)(x)
        return split_space(x + y)


class Downsample(nn.Module):
    """Halves space and, with `time`, the frames after the first: 1 + 2n -> 1 + n."""

    time: bool  # also halve time
    dtype: DTypeLike = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s i j c"]:
        """Downsample one piece of a clip. Its first frame is kept as it is in time."""
        features = x.shape[-1]
        x = split_space(down_conv(features, self.dtype, "conv")(x))
        if not self.time:
            return x

        time_conv = CausalConv3d(features, (3, 1, 1), 2, self.dtype, name="time_conv")
        y = time_conv(x, first)
        if first:
            y = jnp.concatenate([x[:, :1], y], 1)
        return y


class Upsample(nn.Module):
    """Doubles space and, with `time`, the frames after the first: 1 + n -> 1 + 2n.

    The clip's first frame bypasses the convolution in time and is not in its history.
    """

    features: int  # channels of the output
    time: bool  # also double time
    dtype: DTypeLike = jnp.float32  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s i j f"]:
        """Upsample one piece of a clip."""
        if self.time:
            x = self._double_frames(x, first)
        conv = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv")
        return split_space(conv(upsample_nearest(x)))

    def _double_frames(
        self, x: Float[Array, "b t h w c"], first: bool
    ) -> Float[Array, "b s h w c"]:
        """Compute two frames, side by side in the channels, from each frame."""
        time_conv = CausalConv3d(2 * x.shape[-1], (3, 1, 1), dtype=self.dtype, name="time_conv")
        pairs = time_conv(x[:, 1:] if first else x, first)
        frames = rearrange(pairs, "b t h w (i c) -> b (t i) h w c", i=2)
        if first:
            frames = jnp.concatenate([x[:, :1], frames], 1)
        return frames


def mean_down(
    x: Float[Array, "b t h w c"], features: int, time: int, space: int
) -> Float[Array, "b s i j f"]:
    """Move blocks of pixels into channels, averaged in groups to `features`.

    A block is time x space x space pixels. Zero frames before the clip fill its first block (Wan
    2.2's AvgDown3D).
    """
    missing = -x.shape[1] % time
    x = jnp.pad(x, [(0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)])
    x = rearrange(x, "b (t i) (h j) (w k) c -> b t h w (c i j k)", i=time, j=space, k=space)
    return x.reshape(*x.shape[:-1], features, -1).mean(-1)


def repeat_up(
    x: Float[Array, "b t h w c"], features: int, time: int, space: int, first: bool
) -> Float[Array, "b s i j f"]:
    """Repeat channels and lay them out as blocks of time x space x space pixels.

    The clip's first frame gives one frame (Wan 2.2's DupUp3D).
    """
    repeats = features * time * space**2 // x.shape[-1]
    x = jnp.repeat(x, repeats, -1)
    x = rearrange(x, "b t h w (c i j k) -> b (t i) (h j) (w k) c", i=time, j=space, k=space)
    return x[:, time - 1 :] if first else x
