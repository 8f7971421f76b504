"""The image autoencoder of Stable Diffusion, frame by frame: a latent video without time.

The design and the meaning of the fields are those of `AutoencoderKL` in diffusers (Rombach et
al. 2022), so that public weights are a configuration of this class (vdx.interop.vae).
"""

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.build import ConfigError
from vdx.models.image_blocks import GroupNorm, ImageResidual
from vdx.models.vae.blocks import Posterior, attend_frames, double, down_conv
from vdx.types import Array, DTypeLike, Float, PRNGKeyArray


class ImageAttention(nn.Module):
    """Self-attention with one head between the places of each frame, a residual."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Array:
        y = GroupNorm(self.groups, name="norm")(x)
        q, k, v = (nn.Dense(x.shape[-1], name=n, dtype=self.dtype)(y)[:, None] for n in "qkv")
        y = attend_frames(q, k, v)[:, 0]
        return x + nn.Dense(x.shape[-1], name="out", dtype=self.dtype)(y)


class ImageCoder(nn.Module):
    """conv_in, the middle and the levels in the encoder's or the decoder's order, conv_out."""

    widths: tuple[int, ...]
    blocks: int
    out: int
    groups: int
    attention: bool
    up: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Array:
        x = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        if self.up:
            x = self.middle(x)
        for i, width in enumerate(self.widths):
            for j in range(self.blocks):
                x = self.residual(width, f"level_{i}_res_{j}")(x)
            if i == len(self.widths) - 1:
                break
            if self.up:
                x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"level_{i}_resample")(double(x))
            else:
                x = down_conv(width, self.dtype, f"level_{i}_resample")(x)
        if not self.up:
            x = self.middle(x)
        x = nn.silu(GroupNorm(self.groups, name="norm_out")(x))
        return nn.Conv(self.out, (3, 3), dtype=self.dtype, name="conv_out")(x)

    def residual(self, width: int, name: str) -> ImageResidual:
        return ImageResidual(width, self.groups, self.dtype, name=name)

    def middle(self, x: Array) -> Array:
        x = self.residual(x.shape[-1], "middle_res_0")(x)
        if self.attention:
            x = ImageAttention(self.groups, self.dtype, name="middle_attention_0")(x)
        return self.residual(x.shape[-1], "middle_res_1")(x)


class ImageVAE(nn.Module):
    """encode(pixels [... h w 3] in [-1, 1]) -> Posterior; decode(latents) -> pixels.

    Axes before h, such as b and t, are a batch of frames. h and w are multiples of
    2^(levels - 1); latents are (z - shift_factor) * scaling_factor. The other fields are the
    reference's: block_out_channels of the levels, layers_per_block (one more in the decoder),
    use_quant_conv and use_post_quant_conv for 1x1 convolutions around the latents.
    dtype: of the convolutions. Raises ConfigError for widths that do not divide into groups.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: str = "float32"

    def setup(self):
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ConfigError(
                f"image VAE: block_out_channels {self.block_out_channels} must be "
                f"multiples of norm_num_groups {self.norm_num_groups}."
            )
        dtype, widths = jnp.dtype(self.dtype), self.block_out_channels
        self.encoder = ImageCoder(
            widths,
            self.layers_per_block,
            2 * self.latent_channels,
            self.norm_num_groups,
            self.mid_block_add_attention,
            False,
            dtype,
        )
        self.decoder = ImageCoder(
            widths[::-1],
            self.layers_per_block + 1,
            self.out_channels,
            self.norm_num_groups,
            self.mid_block_add_attention,
            True,
            dtype,
        )
        if self.use_quant_conv:
            self.quant_conv = nn.Dense(2 * self.latent_channels, dtype=dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Dense(self.latent_channels, dtype=dtype)

    def __call__(
        self, pixels: Float[Array, "... h w 3"], key: PRNGKeyArray | None = None
    ) -> tuple[Array, Posterior]:
        """(reconstruction, posterior) from a sample of the posterior, or its mode without key."""
        posterior = self.encode(pixels)
        return self.decode(posterior.mode() if key is None else posterior.sample(key)), posterior

    def encode(self, pixels: Float[Array, "... h w 3"]) -> Posterior:
        """The posterior of the latents. Raises ValueError for sizes that do not divide."""
        *batch, h, w, c = pixels.shape
        side = 2 ** (len(self.block_out_channels) - 1)
        if h % side or w % side:
            raise ValueError(
                f"Frames of {h} x {w} do not divide into latents: cut or resize "
                f"them to multiples of {side}."
            )
        z = self.encoder(pixels.reshape(-1, h, w, c))
        z = self.quant_conv(z) if self.use_quant_conv else z
        return Posterior.of(
            z.reshape(*batch, *z.shape[1:]), self.shift_factor or 0.0, 1 / self.scaling_factor
        )

    def decode(self, latents: Float[Array, "... h w z"]) -> Float[Array, "... H W 3"]:
        """float32 pixels of normalised latents; they may leave [-1, 1] a little."""
        *batch, h, w, c = latents.shape
        z = latents.reshape(-1, h, w, c) / self.scaling_factor + (self.shift_factor or 0.0)
        z = self.post_quant_conv(z) if self.use_post_quant_conv else z
        x = self.decoder(z).astype(jnp.float32)
        return x.reshape(*batch, *x.shape[1:])
