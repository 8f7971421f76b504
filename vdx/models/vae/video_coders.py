"""The encoder and the decoder of the video autoencoder: levels around a middle."""

import dataclasses

import flax.linen as nn

from vdx.models.image_blocks import split_space
from vdx.models.layers import RMSNorm
from vdx.models.vae.blocks import (
    NORM_EPS,
    CausalConv3d,
    Downsample,
    FrameAttention,
    ResidualBlock,
    Upsample,
    mean_down,
    repeat_up,
)
from vdx.types import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True)
class LevelSpec:
    """The layers of one level."""

    features: int  # channels of its residual blocks
    blocks: int  # residual blocks
    space: bool  # the level ends by halving (encoder) or doubling (decoder) space
    time: bool  # and time
    attention: bool = False  # attention within frames after each block; encoder only


class DownLevel(nn.Module):
    """Residual blocks, then half the resolution."""

    spec: LevelSpec
    shortcut: bool  # Wan 2.2 adds an average of the level's input to its output
    dtype: DTypeLike  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s i j f"]:
        """Apply the level to one piece of a clip."""
        spec = self.spec
        start = x
        for j in range(spec.blocks):
            x = ResidualBlock(spec.features, self.dtype, name=f"res_{j}")(x, first)
            if spec.attention:
                x = FrameAttention(self.dtype, name=f"attention_{j}")(x)

        if spec.space:
            x = Downsample(spec.time, self.dtype, name="downsample")(x, first)
        if self.shortcut:
            average = mean_down(start, spec.features, 1 + spec.time, 1 + spec.space)
            x = split_space(x + average)
        return x


class UpLevel(nn.Module):
    """Residual blocks, then twice the resolution."""

    spec: LevelSpec
    shortcut: bool  # Wan 2.2 adds a repetition of the level's input to its output
    dtype: DTypeLike  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s i j f"]:
        """Apply the level to one piece of a clip."""
        spec = self.spec
        start = x
        for j in range(spec.blocks):
            x = ResidualBlock(spec.features, self.dtype, name=f"res_{j}")(x, first)
        if not spec.space:
            return x

        # Wan 2.1 halves the channels here, Wan 2.2 in the next level.
        out = spec.features if self.shortcut else spec.features // 2
        x = Upsample(out, spec.time, self.dtype, name="upsample")(x, first)
        if self.shortcut:
            x = split_space(x + repeat_up(start, out, 1 + spec.time, 2, first))
        return x


class Middle(nn.Module):
    """Residual block, attention within frames, residual block."""

    dtype: DTypeLike  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t h w c"]:
        """Apply the stage to one piece of a clip."""
        width = x.shape[-1]
        x = ResidualBlock(width, self.dtype, name="res_0")(x, first)
        x = FrameAttention(self.dtype, name="attention_0")(x)
        return ResidualBlock(width, self.dtype, name="res_1")(x, first)


class Coder(nn.Module):
    """Fields and stages that the encoder and the decoder share."""

    start: int  # channels of the first convolution
    levels: tuple[LevelSpec, ...]  # in the order of computation
    out: int  # channels of the output
    shortcut: bool  # levels have Wan 2.2's shortcuts around them
    dtype: DTypeLike  # of the products

    def conv_in(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t h w f"]:
        """Apply the first convolution."""
        return CausalConv3d(self.start, dtype=self.dtype, name="conv_in")(x, first)

    def head(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t h w o"]:
        """Apply the last norm and convolution."""
        x = nn.silu(RMSNorm(NORM_EPS, name="norm_out")(x))
        return CausalConv3d(self.out, dtype=self.dtype, name="conv_out")(x, first)


class Encoder(Coder):
    """Pixels to moments: convolution, levels, middle, head."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s i j o"]:
        """Encode one piece of a clip."""
        x = self.conv_in(x, first)
        for i, spec in enumerate(self.levels):
            x = DownLevel(spec, self.shortcut, self.dtype, name=f"down_{i}")(x, first)
        x = Middle(self.dtype, name="middle")(x, first)
        return self.head(x, first)


class Decoder(Coder):
    """Latents to pixels: convolution, middle, levels, head."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b s i j o"]:
        """Decode one piece of a clip."""
        x = self.conv_in(x, first)
        x = Middle(self.dtype, name="middle")(x, first)
        for i, spec in enumerate(self.levels):
            x = UpLevel(spec, self.shortcut, self.dtype, name=f"up_{i}")(x, first)
        return self.head(x, first)
