"""Layers that more than one network uses: norms, embeddings, rotary positions, the MLP.

Mixed precision: parameters are float32; matrix products run in the module's `dtype`; norms,
modulation and softmax run in float32 because their sums lose too much in bfloat16.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.models.positions import sinusoidal
from vdx.types import Array, Float


def geglu(x: Float[Array, "... 2d"]) -> Float[Array, "... d"]:
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
    dtype: jnp.dtype = jnp.float32
    out: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.Dense(self.hidden, name="up", dtype=self.dtype)(x)
        h = ACTIVATIONS[self.activation](h)
        return nn.Dense(self.out or x.shape[-1], name="down", dtype=self.dtype)(h)
