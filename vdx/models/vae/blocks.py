"""Layers of the video autoencoders: causal convolution, resampling, residuals, the posterior.

Everything is causal in time: a frame is computed from itself and earlier frames. A clip may so be
processed in pieces: what a piece leaves for the next one, its last frames at each convolution,
is the flax collection "history". `first` says that a piece starts the clip; before it all is zero.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from vdx.models.attention.backends import attend
from vdx.models.layers import RMSNorm
from vdx.models.mixers.conv import convolve
from vdx.parallel import constrain
from vdx.types import Array, DTypeLike, Float, PRNGKeyArray

# Wan divides by max(|x|, 1e-12) over the channels; with this its norm is our RMSNorm.
NORM_EPS = 1e-24
LOGVAR = -30.0, 20.0


class Posterior(flax.struct.PyTreeNode):
    """The normal distribution N(mean, exp(logvar)) of latents z [b t h w z] given a video.

    mean, logvar: of z as the encoder gives it. shift, scale [z]: the latents that a diffusion
    model sees, and that `decode` takes, are (z - shift) / scale.
    """

    mean: Array
    logvar: Array
    shift: Array
    scale: Array

    @classmethod
    def of(cls, moments: Float[Array, "b t h w e"], shift, scale) -> "Posterior":
        """From mean and logarithm of the variance along the last axis."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        return cls(mean, jnp.clip(logvar, *LOGVAR), jnp.float32(shift), jnp.float32(scale))

    def mode(self) -> Array:
        """The most probable latents, normalised."""
        return (self.mean - self.shift) / self.scale

    def sample(self, key: PRNGKeyArray) -> Array:
        """Latents drawn from the posterior, normalised."""
        noise = jax.random.normal(key, self.mean.shape)
        return (self.mean + jnp.exp(0.5 * self.logvar) * noise - self.shift) / self.scale

    def kl(self) -> Float[Array, "b"]:
        """KL divergence of z, before normalisation, from N(0, 1), in nats a clip."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar
        return 0.5 * terms.reshape(len(terms), -1).sum(-1)


def split_space(x: Float[Array, "b t h w c"]) -> Array:
    """Splits frames over the mesh's `context` axis: by rows, by columns where the rows do not
    divide, and not at all where neither does (the deepest levels of small frames)."""
    parts = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    letter = next((a for a, n in zip("hw", x.shape[2:4], strict=True) if n % parts == 0), "")
    return constrain(x, "b t h w c", context=letter)


class CausalConv3d(nn.Module):
    """Convolution [b t h w c] -> [b t h w features], zero-padded in space and before the clip.

    With `stride` 2 (in time) there is no padding in time: output i sees frames 2i .. 2i + 2.
    """

    features: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        space, keep = self.kernel[1:], self.kernel[0] - self.stride
        kernel = self.param(
            "kernel",
            nn.initializers.lecun_normal(),
            (*self.kernel, x.shape[-1], self.features),
            jnp.float32,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        zeros = (len(x), keep if self.stride == 1 else 0, *x.shape[2:])
        past = jnp.zeros(zeros, x.dtype) if first else self.get_variable("history", "frames")
        x = jnp.concatenate([past, x], 1)
        if self.is_mutable_collection("history") and not self.is_initializing():
            self.put_variable("history", "frames", x[:, x.shape[1] - keep :])

        y = convolve(x, kernel, (self.stride, 1, 1), [(k // 2, k // 2) for k in space]) + bias
        return y.astype(self.dtype)


def down_conv(features: int, dtype, name: str, before: int = 0) -> nn.Conv:
    """A 2D convolution that halves a frame [... h w c]; its padding is below and to the right, and
    `before` pixels above and to the left."""
    return nn.Conv(features, (3, 3), 2, [(before, 1)] * 2, dtype=dtype, name=name)


def double(x: Float[Array, "... h w c"]) -> Array:
    """Every pixel as a square of four."""
    return jnp.repeat(jnp.repeat(x, 2, -3), 2, -2)


def attend_frames(q: Array, k: Array, v: Array) -> Array:
    """Attention with one head between the places of each frame, all [b t h w d]."""
    flat = (rearrange(a, "b t h w d -> b t (h w) 1 d") for a in (q, k, v))
    return attend(*flat).reshape(q.shape)


class FrameAttention(nn.Module):
    """Self-attention within each frame, a residual."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Array:
        width = x.shape[-1]
        y = RMSNorm(NORM_EPS, name="norm")(x)
        qkv = nn.Dense(3 * width, name="qkv", dtype=self.dtype)(y)
        y = attend_frames(*jnp.split(qkv, 3, -1))
        return split_space(x + nn.Dense(width, name="out", dtype=self.dtype)(y))


class ResidualBlock(nn.Module):
    """Two causal convolutions, each after norm and SiLU, beside a shortcut."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        y = nn.silu(RMSNorm(NORM_EPS, name="norm1")(x))
        y = CausalConv3d(self.features, dtype=self.dtype, name="conv1")(y, first)
        y = nn.silu(RMSNorm(NORM_EPS, name="norm2")(y))
        y = CausalConv3d(self.features, dtype=self.dtype, name="conv2")(y, first)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="shortcut", dtype=self.dtype)(x)
        return split_space(x + y)


class Downsample(nn.Module):
    """Halves space and, with `time`, the frames after the first: 1 + 2n -> 1 + n."""

    time: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        features = x.shape[-1]
        x = split_space(down_conv(features, self.dtype, "conv")(x))
        if self.time:
            y = CausalConv3d(features, (3, 1, 1), 2, self.dtype, name="time_conv")(x, first)
            x = jnp.concatenate([x[:, :1], y], 1) if first else y
        return x


class Upsample(nn.Module):
    """Doubles space and, with `time`, the frames after the first: 1 + n -> 1 + 2n.

    The clip's first frame passes the convolution in time by and is not in its history.
    """

    features: int
    time: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        if self.time:
            time_conv = CausalConv3d(2 * x.shape[-1], (3, 1, 1), dtype=self.dtype, name="time_conv")
            pairs = time_conv(x[:, 1:] if first else x, first)
            pairs = rearrange(pairs, "b t h w (i c) -> b (t i) h w c", i=2)
            x = jnp.concatenate([x[:, :1], pairs], 1) if first else pairs
        conv = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv")
        return split_space(conv(double(x)))


def mean_down(x: Float[Array, "b t h w c"], features: int, time: int, space: int) -> Array:
    """Blocks of time x space x space pixels laid into channels, averaged in groups to `features`.

    Zero frames before the clip fill its first block (Wan 2.2's AvgDown3D).
    """
    x = jnp.pad(x, [(0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)])
    x = rearrange(x, "b (t i) (h j) (w k) c -> b t h w (c i j k)", i=time, j=space, k=space)
    return x.reshape(*x.shape[:-1], features, -1).mean(-1)


def repeat_up(
    x: Float[Array, "b t h w c"], features: int, time: int, space: int, first: bool
) -> Array:
    """Channels, repeated, laid out as blocks of time x space x space pixels; the clip's first
    frame gives one frame (Wan 2.2's DupUp3D)."""
    x = jnp.repeat(x, features * time * space**2 // x.shape[-1], -1)
    x = rearrange(x, "b t h w (c i j k) -> b (t i) (h j) (w k) c", i=time, j=space, k=space)
    return x[:, time - 1 :] if first else x
