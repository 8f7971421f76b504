"""The causal 3D convolution autoencoder of Wan 2.1 and 2.2.

It turns 1 + 4n frames into 1 + n latent frames. The design and the meaning of the fields are those
of `AutoencoderKLWan` in diffusers, so that pretrained weights are a configuration of this class
(vdx.interop.video_vae reads them). The reference computes a clip latent by latent with a cache.
Here a whole clip is one program, and `chunk` gives the same result in bounded memory.
"""

from typing import Annotated, Any, NamedTuple, cast

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from vdx.config.build import ConfigError
from vdx.config.ranges import Channels, Finite, Interval, Length, LevelBlocks, Positive
from vdx.models.image_blocks import split_space
from vdx.models.vae.chunks import FrameRates, causal_chunks
from vdx.models.vae.posterior import Posterior
from vdx.models.vae.tiling import tiled
from vdx.models.vae.video_coders import Decoder, Encoder, LevelSpec
from vdx.types import Array, Float, PRNGKeyArray


class CompressionRates(NamedTuple):
    """Pixels per latent pixel."""

    frames: int  # per latent frame after the first
    side: int  # along the height and along the width


class VideoVAE(nn.Module):
    """An autoencoder of clips.

    encode(video in [-1, 1]) -> Posterior; decode(latents) -> video. A video is [b t h w 3], where t
    is 1 + 4n and h, w are multiples of 8 (16 for Wan 2.2). Its latents are [b 1+n h/8 w/8 z_dim],
    normalised. Raises ConfigError for fields that contradict one another.
    """

    # The names of the fields are the reference's; the values are Wan 2.1's.
    base_dim: Channels = 96  # channels that dim_mult multiplies
    decoder_base_dim: Channels | None = None  # the same for the decoder; None: base_dim
    z_dim: Channels = 16  # channels of the latents
    # Of each level, finest first.
    dim_mult: Annotated[tuple[Annotated[int, Interval(1, 64)], ...], Length(8)] = (1, 2, 4, 4)
    num_res_blocks: LevelBlocks = 2  # in a level of the encoder; the decoder has one more
    # Resolutions at which the encoder's blocks have attention.
    attn_scales: tuple[Positive, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # steps that also halve time
    is_residual: bool = False  # Wan 2.2's shortcuts around levels
    # Side of the squares of pixels moved into channels; None: 1.
    patch_size: Annotated[int, Interval(1, 64)] | None = None
    in_channels: Channels = 3  # of the encoder, after the patches
    out_channels: Channels = 3  # of the decoder, before the patches
    latents_mean: tuple[Finite, ...] = ()  # [z_dim], of the latents as encoded; empty: 0
    latents_std: tuple[Positive, ...] = ()  # [z_dim]; empty, for a VAE in training: 1
    dtype: str = "float32"  # of the convolutions

    @property
    def rates(self) -> CompressionRates:
        """Frames per latent frame after the first, and pixels per side of a latent pixel."""
        halvings = len(self.dim_mult) - 1
        return CompressionRates(
            frames=2 ** sum(self.temperal_downsample),
            side=2**halvings * (self.patch_size or 1),
        )

    def check(self) -> None:
        """Raise ConfigError for fields that contradict one another."""
        problems = []
        levels = len(self.dim_mult)

        # Levels.
        if len(self.temperal_downsample) != levels - 1:
            problems.append(
                f"temperal_downsample {self.temperal_downsample} must have one entry for each of "
                f"the {levels - 1} steps between the levels of dim_mult {self.dim_mult}"
            )

        if self.is_residual and self.attn_scales:
            problems.append("attn_scales has no meaning with is_residual")

        # Channels around the patches.
        patch = self.patch_size or 1
        if self.in_channels % patch**2 or self.out_channels % patch**2:
            problems.append(
                f"in_channels {self.in_channels} and out_channels {self.out_channels} must be "
                f"multiples of patch_size {patch} squared"
            )

        # Statistics of the latents.
        if not {len(self.latents_mean), len(self.latents_std)} <= {0, self.z_dim}:
            problems.append(
                f"latents_mean and latents_std must have z_dim = {self.z_dim} entries, not "
                f"{len(self.latents_mean)} and {len(self.latents_std)}"
            )

        if problems:
            raise ConfigError(f"video VAE: {'; '.join(problems)}.")

    def setup(self) -> None:
        """Build the parts."""
        self.check()
        dtype = jnp.dtype(self.dtype)
        encoder_levels = self._encoder_levels()
        self.encoder = Encoder(
            self.base_dim, encoder_levels, 2 * self.z_dim, self.is_residual, dtype
        )
        self.quant_conv = nn.Dense(2 * self.z_dim, dtype=dtype)
        self.post_quant_conv = nn.Dense(self.z_dim, dtype=dtype)
        decoder_levels = self._decoder_levels()
        self.decoder = Decoder(
            decoder_levels[0].features, decoder_levels, self.out_channels, self.is_residual, dtype
        )

    def _encoder_levels(self) -> tuple[LevelSpec, ...]:
        """Return the encoder's levels, finest first. The last one keeps its resolution."""
        halves_time = (*self.temperal_downsample, False)
        last = len(self.dim_mult) - 1
        return tuple(
            LevelSpec(
                features=self.base_dim * multiple,
                blocks=self.num_res_blocks,
                space=i < last,
                time=halves_time[i],
                attention=2.0**-i in self.attn_scales,
            )
            for i, multiple in enumerate(self.dim_mult)
        )

    def _decoder_levels(self) -> tuple[LevelSpec, ...]:
        """Return the decoder's levels, deepest first. The last one keeps its resolution."""
        base = self.decoder_base_dim or self.base_dim
        doubles_time = (*self.temperal_downsample[::-1], False)
        last = len(self.dim_mult) - 1
        return tuple(
            LevelSpec(
                features=base * multiple,
                blocks=self.num_res_blocks + 1,
                space=i < last,
                time=doubles_time[i],
            )
            for i, multiple in enumerate(self.dim_mult[::-1])
        )

    def __call__(
        self, video: Float[Array, "b t h w 3"], key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "b t h w 3"], Posterior]:
        """Return (reconstruction, posterior).

        The reconstruction is of a sample, or of the mode without a key.
        """
        posterior = self.encode(video)
        latents = posterior.mode() if key is None else posterior.sample(key)
        return self.decode(latents), posterior

    def encode(self, video: Float[Array, "b t h w 3"], chunk: int | None = None) -> Posterior:
        """Return the posterior of the latents.

        chunk: latent frames computed at a time; None: all. Raises ValueError for a clip that does
        not divide into latents.
        """
        return self._posterior(self._moments(video, chunk))

    def decode(
        self, latents: Float[Array, "b t h w z"], chunk: int | None = None
    ) -> Float[Array, "b T H W 3"]:
        """Return float32 pixels of normalised latents.

        chunk: latent frames computed at a time; None: all. Pixels may leave [-1, 1] a little: clip
        them to show them, but not in training.
        """
        return self._in_chunks("decode_piece", latents, chunk, FrameRates(1, self.rates.frames))

    def encode_tiled(
        self,
        video: Float[Array, "b t h w 3"],
        tile: int | tuple[int, int],
        overlap: int,
        chunk: int | None = None,
    ) -> Posterior:
        """Encode in tiles of pixels (see vdx.models.vae.tiling)."""
        vae, variables = self.unbind()

        def moments(x: Array) -> Array:
            return cast(Array, vae.apply(variables, x, chunk, method="_moments"))

        return self._posterior(tiled(moments, video, tile, overlap))

    def decode_tiled(
        self,
        latents: Float[Array, "b t h w z"],
        tile: int | tuple[int, int],
        overlap: int,
        chunk: int | None = None,
    ) -> Float[Array, "b T H W 3"]:
        """Decode in tiles of latent pixels (see vdx.models.vae.tiling)."""
        vae, variables = self.unbind()

        def pixels(z: Array) -> Array:
            return cast(Array, vae.apply(variables, z, chunk, method="decode"))

        return tiled(pixels, latents, tile, overlap)

    def encode_piece(
        self, video: Float[Array, "b t h w 3"], first: bool = True
    ) -> Float[Array, "b s i j m"]:
        """Return the moments, m = 2z channels, of one piece of a clip.

        A piece has 1 + 4n frames at a clip's start, 4n later. Apply with the collection "history"
        mutable, and give it to the next piece.
        """
        p = self.patch_size or 1
        x = rearrange(video, "b t (h q) (w r) c -> b t h w (c r q)", q=p, r=p)
        return self.quant_conv(self.encoder(split_space(x), first)).astype(jnp.float32)

    def decode_piece(
        self, latents: Float[Array, "b t h w z"], first: bool = True
    ) -> Float[Array, "b T H W 3"]:
        """Return the pixels of one piece of a clip's latents.

        The collection "history" is as in `encode_piece`.
        """
        mean, std = self._latent_statistics()
        z = latents * jnp.broadcast_to(std, latents.shape)
        z = z + jnp.broadcast_to(mean, latents.shape)
        x = self.post_quant_conv(split_space(z))
        x = self.decoder(x, first).astype(jnp.float32)

        p = self.patch_size or 1
        return rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=p, r=p)

    def _latent_statistics(self) -> tuple[Float[Array, "z"], Float[Array, "z"]]:
        """Return (mean, standard deviation) of the latents as encoded."""
        mean = self.latents_mean or (0.0,) * self.z_dim
        std = self.latents_std or (1.0,) * self.z_dim
        return jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32)

    def _posterior(self, moments: Float[Array, "b t h w m"]) -> Posterior:
        return Posterior.from_moments(moments, *self._latent_statistics())

    def _moments(
        self, video: Float[Array, "b t h w 3"], chunk: int | None
    ) -> Float[Array, "b s i j m"]:
        """Return the moments of a whole clip. Raises ValueError if it does not divide."""
        frames, side = self.rates
        t, h, w = video.shape[1:4]
        if (t - 1) % frames or h % side or w % side:
            raise ValueError(
                f"A clip of {t} frames of {h} x {w} does not divide into latents: "
                f"cut it to 1 + {frames}n frames whose sides are multiples of "
                f"{side}, such as {1 + (t - 1) // frames * frames} of "
                f"{max(1, h // side) * side} x {max(1, w // side) * side}."
            )
        return self._in_chunks("encode_piece", video, chunk, FrameRates(frames, 1))

    def _in_chunks(
        self, method: str, x: Float[Array, "b t ..."], chunk: int | None, rates: FrameRates
    ) -> Float[Array, "b s ..."]:
        """Run `encode_piece` or `decode_piece` over a clip, at once without a chunk."""
        if chunk is None:
            return getattr(self, method)(x)
        vae, variables = self.unbind()

        def step(history: Any, piece: Array, first: bool) -> tuple[Array, Any]:
            given = {**variables, "history": history}
            y, changed = vae.apply(given, piece, first, method=method, mutable=["history"])
            return y, changed["history"]

        return causal_chunks(step, x, chunk, rates)
