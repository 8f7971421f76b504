"""The causal 3D convolution autoencoder of Wan 2.1 and 2.2: 1 + 4n frames in 1 + n latents.

The design and the meaning of the fields are those of `AutoencoderKLWan` in diffusers, so that
public weights are a configuration of this class (vdx.interop.vae reads them). The reference
computes a clip latent by latent with a cache; here a whole clip is one program, and `chunk`
gives the same in bounded memory.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdx.config.build import ConfigError
from vdx.models.layers import RMSNorm
from vdx.models.vae.blocks import (
    NORM_EPS,
    CausalConv3d,
    Downsample,
    FrameAttention,
    Posterior,
    ResidualBlock,
    Upsample,
    mean_down,
    repeat_up,
    split_space,
)
from vdx.models.vae.tiling import tiled
from vdx.types import Array, DTypeLike, Float, PRNGKeyArray


class DownLevel(nn.Module):
    """Residual blocks, then half the resolution; Wan 2.2 adds an average beside it all."""

    features: int
    blocks: int
    attention: bool
    space: bool
    time: bool
    residual: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        start = x
        for j in range(self.blocks):
            x = ResidualBlock(self.features, self.dtype, name=f"res_{j}")(x, first)
            if self.attention:
                x = FrameAttention(self.dtype, name=f"attention_{j}")(x)
        if self.space:
            x = Downsample(self.time, self.dtype, name="downsample")(x, first)
        if self.residual:
            x = split_space(x + mean_down(start, self.features, 1 + self.time, 1 + self.space))
        return x


class UpLevel(nn.Module):
    """Residual blocks, then twice the resolution; Wan 2.2 adds a repetition beside it all."""

    features: int
    blocks: int
    space: bool
    time: bool
    residual: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        start = x
        for j in range(self.blocks):
            x = ResidualBlock(self.features, self.dtype, name=f"res_{j}")(x, first)
        if not self.space:
            return x
        out = self.features if self.residual else self.features // 2
        x = Upsample(out, self.time, self.dtype, name="upsample")(x, first)
        if self.residual:
            x = split_space(x + repeat_up(start, out, 1 + self.time, 2, first))
        return x


class Middle(nn.Module):
    """Residual block, attention within frames, residual block."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        x = ResidualBlock(x.shape[-1], self.dtype, name="res_0")(x, first)
        x = FrameAttention(self.dtype, name="attention_0")(x)
        return ResidualBlock(x.shape[-1], self.dtype, name="res_1")(x, first)


class Coder(nn.Module):
    """conv_in, the middle and the levels in the encoder's or the decoder's order, conv_out."""

    start: int
    levels: tuple[dict[str, Any], ...]
    out: int
    up: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Array:
        x = CausalConv3d(self.start, dtype=self.dtype, name="conv_in")(x, first)
        if self.up:
            x = Middle(self.dtype, name="middle")(x, first)
        for i, level in enumerate(self.levels):
            kind, name = (UpLevel, f"up_{i}") if self.up else (DownLevel, f"down_{i}")
            x = kind(**level, dtype=self.dtype, name=name)(x, first)
        if not self.up:
            x = Middle(self.dtype, name="middle")(x, first)
        x = nn.silu(RMSNorm(NORM_EPS, name="norm_out")(x))
        return CausalConv3d(self.out, dtype=self.dtype, name="conv_out")(x, first)


class VideoVAE(nn.Module):
    """encode(video [b t h w 3] in [-1, 1]) -> Posterior; decode(latents) -> video.

    t is 1 + 4n and h, w are multiples of 8 (16 for Wan 2.2); latents are [b 1+n h/8 w/8 z_dim],
    normalised. base_dim, decoder_base_dim (None: the same), dim_mult: channels of the levels;
    num_res_blocks in each (one more in the decoder). attn_scales: resolutions at which the
    encoder's blocks have attention. temperal_downsample: which steps between levels also halve
    time. is_residual: Wan 2.2's shortcuts around levels. patch_size: squares of pixels laid into
    in_channels and out_channels. latents_mean, latents_std [z_dim]: of the latents as encoded;
    empty for those of a VAE that is being trained, 0 and 1. dtype: of the convolutions.
    Raises ConfigError for fields that contradict one another.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    patch_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    dtype: str = "float32"

    @property
    def rates(self) -> tuple[int, int]:
        """Frames a latent frame (after the first), and pixels a side of a latent pixel."""
        return (
            2 ** sum(self.temperal_downsample),
            2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1),
        )

    def check(self) -> None:
        """Raises ConfigError for fields that contradict one another."""
        levels, patch = len(self.dim_mult), self.patch_size or 1
        problems = [
            message
            for wrong, message in (
                (
                    len(self.temperal_downsample) != levels - 1,
                    f"temperal_downsample {self.temperal_downsample} must have one entry for each of "
                    f"the {levels - 1} steps between the levels of dim_mult {self.dim_mult}",
                ),
                (
                    self.is_residual and self.attn_scales,
                    "attn_scales has no meaning with is_residual",
                ),
                (
                    self.in_channels % patch**2 or self.out_channels % patch**2,
                    f"in_channels {self.in_channels} and out_channels {self.out_channels} must be "
                    f"multiples of patch_size {patch} squared",
                ),
                (
                    not {len(self.latents_mean), len(self.latents_std)} <= {0, self.z_dim},
                    f"latents_mean and latents_std must have z_dim = {self.z_dim} entries, not "
                    f"{len(self.latents_mean)} and {len(self.latents_std)}",
                ),
            )
            if wrong
        ]
        if problems:
            raise ConfigError(f"video VAE: {'; '.join(problems)}.")

    def _levels(self, up: bool) -> tuple[int, tuple[dict[str, Any], ...]]:
        """Channels of the first convolution, and the fields of each level."""
        base = (self.decoder_base_dim or self.base_dim) if up else self.base_dim
        dims, time = [base * m for m in self.dim_mult], [*self.temperal_downsample]
        if up:
            dims, time = dims[::-1], time[::-1]
        last = len(dims) - 1
        levels = [
            dict(
                features=dim,
                blocks=self.num_res_blocks + up,
                space=i < last,
                time=i < last and time[i],
                residual=self.is_residual,
            )
            for i, dim in enumerate(dims)
        ]
        if not up:
            for i, level in enumerate(levels):
                level["attention"] = 2.0**-i in self.attn_scales
        return dims[0] if up else base, tuple(levels)

    def setup(self):
        self.check()
        dtype = jnp.dtype(self.dtype)
        start, levels = self._levels(up=False)
        self.encoder = Coder(start, levels, 2 * self.z_dim, False, dtype)
        self.quant_conv = nn.Dense(2 * self.z_dim, dtype=dtype)
        self.post_quant_conv = nn.Dense(self.z_dim, dtype=dtype)
        start, levels = self._levels(up=True)
        self.decoder = Coder(start, levels, self.out_channels, True, dtype)

    def __call__(
        self, video: Float[Array, "b t h w 3"], key: PRNGKeyArray | None = None
    ) -> tuple[Array, Posterior]:
        """(reconstruction, posterior) from a sample of the posterior, or its mode without key."""
        posterior = self.encode(video)
        return self.decode(posterior.mode() if key is None else posterior.sample(key)), posterior

    def encode(self, video: Float[Array, "b t h w 3"], chunk: int | None = None) -> Posterior:
        """The posterior of the latents; `chunk`: latent frames computed at a time (None: all).

        Raises ValueError for a clip that does not divide into latents.
        """
        return self._posterior(self._moments(video, chunk))

    def decode(
        self, latents: Float[Array, "b t h w z"], chunk: int | None = None
    ) -> Float[Array, "b T H W 3"]:
        """float32 pixels of normalised latents, `chunk` latent frames at a time (None: all).

        Pixels may leave [-1, 1] a little: whoever shows them clips, training must not.
        """
        return self._in_chunks("decode_piece", latents, chunk, (1, self.rates[0]))

    def encode_tiled(
        self,
        video: Float[Array, "b t h w 3"],
        tile: int | tuple[int, int],
        overlap: int,
        chunk: int | None = None,
    ) -> Posterior:
        """As `encode`, in tiles of pixels (see vdx.models.vae.tiling)."""
        vae, variables = self.unbind()
        return self._posterior(
            tiled(lambda x: vae.apply(variables, x, chunk, method="_moments"), video, tile, overlap)
        )

    def decode_tiled(
        self,
        latents: Float[Array, "b t h w z"],
        tile: int | tuple[int, int],
        overlap: int,
        chunk: int | None = None,
    ) -> Float[Array, "b T H W 3"]:
        """As `decode`, in tiles of latent pixels (see vdx.models.vae.tiling)."""
        vae, variables = self.unbind()
        return tiled(
            lambda z: vae.apply(variables, z, chunk, method="decode"), latents, tile, overlap
        )

    def encode_piece(self, video: Float[Array, "b t h w 3"], first: bool = True) -> Array:
        """Moments [b t h w 2z] of one piece of a clip: 1 + 4n frames at its start, 4n later.

        Apply with the collection "history" mutable, and give it to the next piece.
        """
        p = self.patch_size or 1
        x = rearrange(video, "b t (h q) (w r) c -> b t h w (c r q)", q=p, r=p)
        return self.quant_conv(self.encoder(split_space(x), first)).astype(jnp.float32)

    def decode_piece(self, latents: Float[Array, "b t h w z"], first: bool = True) -> Array:
        """Pixels of one piece of a clip's latents; "history" as in `encode_piece`."""
        mean, std = self._stats()
        x = self.post_quant_conv(split_space(latents * std + mean))
        x, p = self.decoder(x, first).astype(jnp.float32), self.patch_size or 1
        return rearrange(x, "b t h w (c r q) -> b t (h q) (w r) c", q=p, r=p)

    def _stats(self) -> tuple[Array, Array]:
        return (
            jnp.array(self.latents_mean or (0.0,) * self.z_dim, jnp.float32),
            jnp.array(self.latents_std or (1.0,) * self.z_dim, jnp.float32),
        )

    def _posterior(self, moments: Array) -> Posterior:
        return Posterior.of(moments, *self._stats())

    def _moments(self, video: Array, chunk: int | None) -> Array:
        (frames, side), (t, h, w) = self.rates, video.shape[1:4]
        if (t - 1) % frames or h % side or w % side:
            raise ValueError(
                f"A clip of {t} frames of {h} x {w} does not divide into latents: "
                f"cut it to 1 + {frames}n frames whose sides are multiples of "
                f"{side}, such as {1 + (t - 1) // frames * frames} of "
                f"{max(1, h // side) * side} x {max(1, w // side) * side}."
            )
        return self._in_chunks("encode_piece", video, chunk, (frames, 1))

    def _in_chunks(self, method: str, x: Array, chunk: int | None, rates: tuple[int, int]) -> Array:
        if chunk is None:
            return getattr(self, method)(x)
        vae, variables = self.unbind()

        def step(history, piece, first):
            y, state = vae.apply(
                {**variables, "history": history}, piece, first, method=method, mutable=["history"]
            )
            return y, state["history"]

        return causal_chunks(step, x, chunk, rates)


def head_of(latents: int, chunk: int) -> int:
    """Latent frames of a clip's first piece, so that all later ones have `chunk`."""
    return 1 + (latents - 1) % chunk


def causal_chunks(
    step: Callable[[Any, Array, bool], tuple[Array, Any]],
    x: Float[Array, "b t ..."],
    chunk: int,
    rates: tuple[int, int],
) -> Array:
    """A clip through `step(history, piece, first) -> (y, history)`, `chunk` latents at a time.

    rates: frames of x and of y a latent frame after the first, which is one in both. The first
    piece takes what is left over, so that all others are of one size: one loop, whose memory
    does not depend on the clip's length.
    """
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} latent frames must be positive.")
    latents = 1 + (x.shape[1] - 1) // rates[0]
    head = head_of(latents, chunk)
    start = [1 + (head - 1) * rate for rate in rates]
    y, history = step({}, x[:, : start[0]], True)
    if head == latents:
        return y
    out = jnp.zeros((len(y), 1 + (latents - 1) * rates[1], *y.shape[2:]), y.dtype)
    out = jax.lax.dynamic_update_slice_in_dim(out, y, 0, 1)

    def body(i, carry):
        history, out = carry
        piece = jax.lax.dynamic_slice_in_dim(
            x, start[0] + i * chunk * rates[0], chunk * rates[0], 1
        )
        y, history = step(history, piece, False)
        return history, jax.lax.dynamic_update_slice_in_dim(
            out, y, start[1] + i * chunk * rates[1], 1
        )

    return jax.lax.fori_loop(0, (latents - head) // chunk, body, (history, out))[1]
