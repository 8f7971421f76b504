"""The image autoencoder of Stable Diffusion, applied frame by frame.

The design and the meaning of the fields are those of `AutoencoderKL` in diffusers (Rombach et
al. 2022), so that pretrained weights are a configuration of this class (vdx.interop.image_vae).
"""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.build import ConfigError
from vdx.config.ranges import Channels, Finite, Length, LevelBlocks, Positive
from vdx.models.image_blocks import GroupNorm, ImageResidual, down_conv, upsample_nearest
from vdx.models.vae.blocks import attend_frames
from vdx.models.vae.posterior import Posterior
from vdx.types import Array, DTypeLike, Float, PRNGKeyArray


class ImageAttention(nn.Module):
    """A residual of self-attention between the positions of each frame, with one head."""

    groups: int  # of the group norm
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Apply the layer."""
        width = x.shape[-1]
        y = GroupNorm(self.groups, name="norm")(x)
        # [n 1 h w c]: each frame is a clip of its own.
        q, k, v = (nn.Dense(width, name=name, dtype=self.dtype)(y)[:, None] for name in "qkv")
        y = attend_frames(q, k, v)[:, 0]
        return x + nn.Dense(width, name="out", dtype=self.dtype)(y)


class ImageCoder(nn.Module):
    """Fields and stages that the encoder and the decoder share."""

    widths: tuple[int, ...]  # channels of each level, in the order of computation
    blocks: int  # residuals in each level
    out: int  # channels of the output
    groups: int  # of the group norms
    attention: bool  # the middle has attention
    dtype: DTypeLike  # of the products

    def conv(self, features: int, name: str) -> nn.Conv:
        """Return a 3x3 convolution."""
        return nn.Conv(features, (3, 3), dtype=self.dtype, name=name)

    def residual(self, width: int, name: str) -> ImageResidual:
        """Return a residual block."""
        return ImageResidual(width, self.groups, self.dtype, name=name)

    def level(self, x: Float[Array, "n h w c"], i: int) -> Float[Array, "n h w f"]:
        """Apply the residuals of level `i`."""
        for j in range(self.blocks):
            x = self.residual(self.widths[i], f"level_{i}_res_{j}")(x)
        return x

    def middle(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Apply the deepest stage: residual, attention, residual."""
        width = x.shape[-1]
        x = self.residual(width, "middle_res_0")(x)
        if self.attention:
            x = ImageAttention(self.groups, self.dtype, name="middle_attention_0")(x)
        return self.residual(width, "middle_res_1")(x)

    def head(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w o"]:
        """Apply the last norm and convolution."""
        x = nn.silu(GroupNorm(self.groups, name="norm_out")(x))
        return self.conv(self.out, "conv_out")(x)


class ImageEncoder(ImageCoder):
    """Pixels to moments: convolution, levels, middle, head."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j o"]:
        """Encode frames. Every level but the last halves them."""
        x = self.conv(self.widths[0], "conv_in")(x)
        for i, width in enumerate(self.widths):
            x = self.level(x, i)
            if i < len(self.widths) - 1:
                x = down_conv(width, self.dtype, f"level_{i}_resample")(x)
        return self.head(self.middle(x))


class ImageDecoder(ImageCoder):
    """Latents to pixels: convolution, middle, levels, head."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n i j o"]:
        """Decode frames. Every level but the last doubles them."""
        x = self.conv(self.widths[0], "conv_in")(x)
        x = self.middle(x)
        for i, width in enumerate(self.widths):
            x = self.level(x, i)
            if i < len(self.widths) - 1:
                x = self.conv(width, f"level_{i}_resample")(upsample_nearest(x))
        return self.head(x)


class ImageVAE(nn.Module):
    """An autoencoder of frames.

    encode(pixels in [-1, 1]) -> Posterior; decode(latents) -> pixels. Axes before h, such as b and
    t, are a batch of frames. h and w are multiples of 2^(levels - 1). Normalised latents are (z -
    shift_factor) * scaling_factor. Raises ConfigError for widths that do not divide into groups.
    """

    # The names of the fields are the reference's; the values are Stable Diffusion 1's.
    # Of the levels, finest first.
    block_out_channels: Annotated[tuple[Channels, ...], Length(8)] = (128, 256, 512, 512)
    layers_per_block: LevelBlocks = 2  # residuals in the encoder; the decoder has one more
    latent_channels: Channels = 4  # z
    norm_num_groups: Channels = 32
    in_channels: Channels = 3
    out_channels: Channels = 3
    scaling_factor: Positive = 0.18215  # 1 / the standard deviation of the latents
    shift_factor: Finite | None = None  # the mean of the latents; None: 0
    use_quant_conv: bool = True  # a 1x1 convolution after the encoder
    use_post_quant_conv: bool = True  # a 1x1 convolution before the decoder
    mid_block_add_attention: bool = True
    dtype: str = "float32"  # of the convolutions

    def setup(self) -> None:
        """Build the parts."""
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ConfigError(
                f"image VAE: block_out_channels {self.block_out_channels} must be "
                f"multiples of norm_num_groups {self.norm_num_groups}."
            )

        # Encoder and decoder have the same levels in opposite orders.
        dtype = jnp.dtype(self.dtype)
        self.encoder = ImageEncoder(
            self.block_out_channels,
            blocks=self.layers_per_block,
            out=2 * self.latent_channels,
            groups=self.norm_num_groups,
            attention=self.mid_block_add_attention,
            dtype=dtype,
        )

        self.decoder = ImageDecoder(
            self.block_out_channels[::-1],
            blocks=self.layers_per_block + 1,
            out=self.out_channels,
            groups=self.norm_num_groups,
            attention=self.mid_block_add_attention,
            dtype=dtype,
        )

        # 1x1 convolutions are dense layers.
        if self.use_quant_conv:
            self.quant_conv = nn.Dense(2 * self.latent_channels, dtype=dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Dense(self.latent_channels, dtype=dtype)

    def __call__(
        self, pixels: Float[Array, "... h w 3"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "... h w 3"], Posterior]:
        """Return (reconstruction, posterior).

        The reconstruction is of a sample, or of the mode without a key.
        """
        posterior = self.encode(pixels)
        latents = posterior.mode() if key is None else posterior.sample(key)
        return self.decode(latents), posterior

    def encode(self, pixels: Float[Array, "... h w 3"]) -> Posterior:
        """Return the posterior of the latents.

        Raises ValueError for sizes that do not divide.
        """
        *batch, h, w, c = pixels.shape
        side = 2 ** (len(self.block_out_channels) - 1)
        if h % side or w % side:
            raise ValueError(
                f"Frames of {h} x {w} do not divide into latents: cut or resize "
                f"them to multiples of {side}."
            )

        moments = self.encoder(pixels.reshape(-1, h, w, c))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        moments = moments.reshape(*batch, *moments.shape[1:])
        return Posterior.from_moments(moments, self.shift_factor or 0.0, 1 / self.scaling_factor)

    def decode(self, latents: Float[Array, "... h w z"]) -> Float[Array, "... H W 3"]:
        """Return float32 pixels of normalised latents; they may leave [-1, 1] a little."""
        *batch, h, w, c = latents.shape
        z = latents.reshape(-1, h, w, c) / self.scaling_factor + (self.shift_factor or 0.0)
        if self.use_post_quant_conv:
            z = self.post_quant_conv(z)
        x = self.decoder(z).astype(jnp.float32)
        return x.reshape(*batch, *x.shape[1:])
