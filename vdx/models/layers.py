"""Layers that more than one network uses: norms, embeddings, rotary positions, the MLP.

Mixed precision: parameters are float32; matrix products run in the module's `dtype`; norms,
modulation and softmax run in float32 because their sums lose too much in bfloat16.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdx.types import Array, DTypeLike, Float, Int


def geglu(x: Float[Array, "... e"]) -> Float[Array, "... d"]:
    """The first half of the features, gated by the second (Shazeer 2020)."""
    x, gate = jnp.split(x, 2, -1)
    return x * nn.gelu(gate, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": nn.gelu,  # tanh form, as in Wan and T5
    "gelu_exact": partial(nn.gelu, approximate=False),  # BERT, CLIP ViT-H
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "silu": nn.silu,
    "geglu": geglu,  # the U-Nets
    "relu2": lambda x: jnp.square(nn.relu(x)),  # Primer (So et al. 2021); the cheapest on a CPU
}


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """LayerNorm without parameters over the last axis, in float32; the modulation scales it."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, in float32, returned in the input's dtype."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


def sinusoidal(
    x: Float[Array, "..."] | Int[Array, "..."], width: int, max_period: float = 1e4
) -> Array:
    """[...] -> [... width]: cosines then sines of x at geometric frequencies (Vaswani 2017)."""
    half = width // 2
    freqs = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = x.astype(jnp.float32)[..., None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class EmbedMLP(nn.Module):
    """Sinusoid -> dense -> SiLU -> dense: the embedding of a scalar (time, frame rate, ...)."""

    width: int
    sinusoid: int = 256

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Array:
        x = sinusoidal(x, self.sinusoid)  # float32: a bfloat16 time loses neighbouring steps
        x = nn.silu(nn.Dense(self.width, name="up", dtype=jnp.float32)(x))
        # Small at first (Peebles & Xie 2023), or it would modulate at random what it knows not.
        return nn.Dense(
            self.width, name="down", dtype=jnp.float32, kernel_init=nn.initializers.normal(0.02)
        )(x)


def add_vector(emb: Array, vector: Array, t: int) -> Array:
    """The time embedding [b d] or [b t d] and a vector [b d] or, one for each frame of the clip,
    [b t*k d], of which one of the t frames of tokens hears its k; in the calling module's scope."""
    if vector.ndim == 3:
        if vector.shape[1] > t:
            vector = vector.reshape(len(vector), t, -1)
            vector = nn.Dense(emb.shape[-1], name="frames", dtype=jnp.float32)(vector)
        return (emb if emb.ndim == 3 else emb[:, None]) + vector
    return emb + (vector if emb.ndim == 2 else vector[:, None])


class MLP(nn.Module):
    """dense -> activation -> dense, back to the input's width unless `out` is given."""

    hidden: int
    activation: str = "gelu"
    dtype: DTypeLike = jnp.float32
    out: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.Dense(self.hidden, name="up", dtype=self.dtype)(x)
        h = ACTIVATIONS[self.activation](h)
        return nn.Dense(self.out or x.shape[-1], name="down", dtype=self.dtype)(h)


def dct_basis(patch: tuple[int, int, int], channels: int, width: int) -> np.ndarray:
    """The `width` lowest frequencies of a patch [pt*ph*pw*channels, width], orthonormal columns.

    3D DCT-II of each channel, ordered by spatial-temporal frequency, channels in turn; columns
    beyond the patch's size are zero. Video is smooth and noise is white, so these are the
    directions in which a noisy patch says most: a projection to start training from.
    """

    def dct(n: int) -> np.ndarray:
        k, x = np.arange(n)[None], np.arange(n)[:, None] + 0.5
        return np.cos(np.pi * k * x / n) * np.sqrt(np.where(k == 0, 1, 2) / n)  # [x k]

    basis = np.einsum("ta,hb,wc->thwabc", *(dct(n) for n in patch))
    frequency = sum(np.square(k / n) for k, n in zip(np.indices(patch), patch, strict=True))
    order = np.argsort(frequency.ravel(), kind="stable")
    basis = basis.reshape(math.prod(patch), -1)[:, order]
    every = np.einsum("pk,cd->pckd", basis, np.eye(channels)).reshape(len(basis) * channels, -1)
    out = np.zeros((len(every), width), np.float32)
    out[:, : every.shape[1]] = every[:, :width]
    return out


def low_frequencies(patch: tuple[int, int, int], out: bool = False):
    """An initializer for the projection of patches to features, or (`out`) back."""

    def init(key, shape, dtype=jnp.float32):
        pixels, width = shape[::-1] if out else shape
        basis = dct_basis(patch, pixels // math.prod(patch), width)
        return jnp.asarray(basis.T * 0.5 if out else basis, dtype)

    return init


def _over_axes(
    grid: tuple[int, int, int], width: int, rows: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """[t h w f], float64: rows(entries, features) of each axis, laid along it, side by side.

    The features are divided between the axes as in Wan: 2 * (width // 6) each for h and w, the
    rest for t.
    """
    space, tables = 2 * (width // 6), []
    for axis, features in enumerate((width - 2 * space, space, space)):
        table = rows(grid[axis], features)
        shape = [1, 1, 1, table.shape[-1]]
        shape[axis] = grid[axis]
        tables.append(np.broadcast_to(table.reshape(shape), (*grid, table.shape[-1])))
    return np.concatenate(tables, -1)


def place_table(grid: tuple[int, int, int], width: int) -> np.ndarray:
    """Cosines and sines [t h w width] of each token's place, relative to the size of the grid.

    The frequencies of an axis of n tokens run geometrically from half a period to n/4 periods
    over the whole axis.
    """

    def rows(n: int, features: int) -> np.ndarray:
        freqs = np.pi * np.geomspace(1.0, max(n / 2, 1.0), features // 2)
        angles = (np.arange(n)[:, None] + 0.5) / n * freqs
        return np.concatenate([np.cos(angles), np.sin(angles)], -1)

    out = _over_axes(grid, width, rows)
    return np.pad(out, [(0, 0)] * 3 + [(0, width - out.shape[-1])]).astype(np.float32)


def sincos_table(places: np.ndarray, width: int) -> np.ndarray:
    """[n] -> [n width], float64: sines, then cosines, at geometric frequencies (Vaswani 2017)."""
    angles = places[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def plane_table(grid: tuple[int, int], width: int, base: int) -> np.ndarray:
    """Fixed positions [h w width] of the places of a frame (Peebles & Xie 2023, DiT; Latte): the
    column in the first half of the features, the row in the second. Either axis is as long as
    `base` places, whatever the grid."""
    rows, columns = (sincos_table(np.arange(n) * base / n, width // 2) for n in grid)
    shape = (*grid, width // 2)
    return np.concatenate(
        [np.broadcast_to(columns, shape), np.broadcast_to(rows[:, None], shape)], -1
    ).astype(np.float32)


def rope_table(
    grid: tuple[int, int, int], head_width: int, theta: float = 1e4
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [t h w 1 head_width/2] of 3D rotary positions (Su et al. 2021).

    Angles are built in float64.
    """
    if head_width % 2:
        raise ValueError(f"Rotary positions need an even head width, not {head_width}.")

    def rows(n: int, features: int) -> np.ndarray:
        return np.arange(n)[:, None] * theta ** (
            -np.arange(0, features, 2, dtype=np.float64) / features
        )

    angles = _over_axes(grid, head_width, rows)[..., None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def shift_rope(
    rope: tuple[Any, Any], frames: Int[Array, ""], head_width: int, theta: float = 1e4
) -> tuple[Array, Array]:
    """A `rope_table` moved on by a traced number of frames, exact for 2**20 and more of them.

    Angles are counted in turns of 2**32: such integers wrap around as angles do, where a float32
    angle of many turns has lost its fraction.
    """
    features = head_width - 4 * (head_width // 6)  # those of time come first
    freqs = theta ** (-np.arange(0, features, 2, dtype=np.float64) / features)
    steps = np.zeros(head_width // 2, np.uint32)
    steps[: len(freqs)] = np.round(freqs / (2 * np.pi) * 2**32)
    angles = (frames.astype(jnp.uint32) * steps).astype(jnp.float32) * (2 * np.pi / 2**32)
    (cos, sin), c, s = rope, jnp.cos(angles), jnp.sin(angles)
    return cos * c - sin * s, sin * c + cos * s


def apply_rope(x: Float[Array, "b t h w n d"], rope) -> Array:
    """Rotates channel i against channel i + d/2 (half-split form), in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)
