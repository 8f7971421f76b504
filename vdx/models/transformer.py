"""The spatiotemporal transformer: patches -> blocks of (mixer, cross-attention, MLP) -> patches.

Modulation is adaLN-single (Chen et al. 2023, PixArt-alpha; also Wan): one projection of the
time embedding for the whole network plus a learned table in each block. The design is that of
Wan 2.1, so that its weights are a configuration of this class.
"""


import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdx.build import ConfigError, lookup
from vdx.models.attention import CrossAttention
from vdx.models.layers import (
    MLP,
    EmbedMLP,
    LayerNorm,
    dct_basis,
    layer_norm,
    place_table,
    rope_table,
)
from vdx.models.mixers import MIXERS, PATTERNS, MixContext
from vdx.parallel import constrain
from vdx.types import Array, Float, Ports

# width, depth, heads
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 6, 6),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}

_policies = jax.checkpoint_policies
# What is kept from the forward pass for the backward pass.
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
}


def low_frequencies(patch: tuple[int, int, int], out: bool = False):
    """An initializer for the projection of patches to features, or (`out`) back."""
    def init(key, shape, dtype=jnp.float32):
        pixels, width = shape[::-1] if out else shape
        basis = dct_basis(patch, pixels // math.prod(patch), width)
        return jnp.asarray(basis.T * 0.5 if out else basis, dtype)
    return init


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    return layer_norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """One mixer, cross-attention to the text, one MLP, each a residual."""

    mixer: str
    heads: int
    mlp_ratio: float
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"], modulation: Float[Array, "b 6 d"],
                 ports: Ports, context: MixContext) -> Float[Array, "b t h w d"]:
        width = x.shape[-1]
        table = self.param("table", nn.initializers.zeros, (6, width), jnp.float32)
        rows = (modulation + table)[:, :, None, None, None]                  # b 6 1 1 1 d
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows[:, i] for i in range(6))

        mixer = MIXERS[self.mixer](heads=self.heads, dtype=self.dtype, name=self.mixer)
        y = mixer(modulate(x, shift1, scale1).astype(self.dtype), context)
        x = (x + gate1 * y).astype(x.dtype)
        if ports.tokens is not None:
            cross = CrossAttention(self.heads, self.dtype, name="cross")
            x = x + cross(LayerNorm(name="cross_norm")(x), ports.tokens, ports.tokens_mask)
        y = MLP(int(width * self.mlp_ratio), self.activation, self.dtype, name="mlp")(
            modulate(x, shift2, scale2).astype(self.dtype))
        x = (x + gate2 * y).astype(x.dtype)
        return constrain(x, "b t h w d", context="t")


class Period(nn.Module):
    """One pass through the pattern; `nn.scan` repeats it over the depth."""

    pattern: tuple[str, ...]
    block: dict

    @nn.compact
    def __call__(self, x, modulation, ports, context):
        for i, mixer in enumerate(self.pattern):
            x = Block(mixer, **self.block, name=f"block_{i}")(x, modulation, ports, context)
        return x, None


class Transformer(nn.Module):
    """denoiser(x_t [b t h w c], time [b], ports) -> prediction [b t h w c].

    size: a row of SIZES; width, depth and heads override it.
    patch: frames, rows and columns of one token; the grid must divide by it.
    pattern: a row of PATTERNS or a tuple of rows of MIXERS, repeated over the depth.
    rope_theta: sets the slowest rotation of the rotary positions; a grid of a few tokens wants
    a small one. absolute: tokens are also told their place in the clip, so that attention can
    average places (where is the object?), which rotary positions alone learn much later.
    time_scale: multiplies the time that is embedded; below 1 neighbouring noise levels share
    what they learn, which a short training needs. remat: a row of REMAT. dtype: compute type of
    the matrix products.
    """

    channels: int = 3
    size: str = "tiny"
    patch: tuple[int, int, int] = (1, 2, 2)
    pattern: str | tuple[str, ...] = "full"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    rope_theta: float = 10_000.0
    absolute: bool = False
    time_scale: float = 1.0
    remat: str = "none"
    dtype: str = "float32"

    def dims(self) -> tuple[int, int, int, tuple[str, ...]]:
        """(width, depth, heads, pattern), checked."""
        width, depth, heads = lookup(self.size, SIZES, "model.size")
        width, depth, heads = self.width or width, self.depth or depth, self.heads or heads
        pattern = self.pattern
        if isinstance(pattern, str):
            pattern = lookup(pattern, PATTERNS, "model.pattern")
        for mixer in pattern:
            lookup(mixer, MIXERS, "model.pattern")
        if depth % len(pattern):
            raise ConfigError(f"model.depth = {depth} is not a multiple of the pattern {pattern}.")
        if width % (2 * heads):
            raise ConfigError(f"model.width = {width} over {heads} heads is not an even number.")
        return width, depth, heads, tuple(pattern)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The token grid of a clip [t h w c]; raises ValueError if patches do not tile it."""
        if any(n % p for n, p in zip(shape[:3], self.patch, strict=True)):
            raise ValueError(f"A clip of {shape[:3]} (t, h, w) does not divide into patches of "
                             f"{self.patch}; choose sizes that are multiples of the patch.")
        t, h, w = (n // p for n, p in zip(shape[:3], self.patch, strict=True))
        return t, h, w

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], time: Float[Array, "b"],
                 ports: Ports) -> Float[Array, "b t h w c"]:
        width, depth, heads, pattern = self.dims()
        dtype, (pt, ph, pw) = jnp.dtype(self.dtype), self.patch
        grid = self.grid(x.shape[1:])
        if ports.concat is not None:
            x = jnp.concatenate([x, ports.concat.astype(x.dtype)], -1)

        x = rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=pt, j=ph, k=pw)
        # Patches start as their lowest frequencies, and are drawn from them again at the end.
        x = nn.Dense(width, name="patch", dtype=dtype, kernel_init=low_frequencies(self.patch))(x)
        if self.absolute:
            x = x + jnp.asarray(place_table(grid, width), x.dtype)
        if ports.add is not None:
            x = x + ports.add.astype(x.dtype)
        x = constrain(x, "b t h w d", context="t")

        emb = EmbedMLP(width, name="time")(time * self.time_scale)
        if ports.vector is not None:
            emb = emb + ports.vector
        modulation = nn.Dense(6 * width, name="modulation", dtype=jnp.float32,
                              kernel_init=nn.initializers.zeros)(nn.silu(emb))
        modulation = rearrange(modulation, "b (m d) -> b m d", m=6)
        if ports.tokens is not None:
            ports = ports.replace(tokens=ports.tokens.astype(dtype))

        context = MixContext(rope=rope_table(grid, width // heads, self.rope_theta))
        policy = lookup(self.remat, REMAT, "model.remat")
        period = Period if policy is None else nn.remat(Period, policy=policy, prevent_cse=False)
        layers = nn.scan(period, variable_axes={"params": 0}, split_rngs={"params": True},
                         in_axes=nn.broadcast, length=depth // len(pattern))
        block = dict(heads=heads, mlp_ratio=self.mlp_ratio, activation=self.activation, dtype=dtype)
        x, _ = layers(pattern, block, name="layers")(x, modulation, ports, context)

        table = self.param("table", nn.initializers.zeros, (2, width), jnp.float32)
        shift, scale = ((emb + row)[:, None, None, None] for row in table)
        x = modulate(x, shift, scale).astype(dtype)
        x = nn.Dense(pt * ph * pw * self.channels, name="unpatch", dtype=jnp.float32,
                     kernel_init=low_frequencies(self.patch, out=True))(x)
        return rearrange(x, "b t h w (i j k c) -> b (t i) (h j) (w k) c", i=pt, j=ph, k=pw)
