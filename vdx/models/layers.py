"""Layers that more than one network uses: norms, embeddings, the MLP.

Mixed precision: parameters are float32. Matrix products run in the module's `dtype`. Norms,
modulation and softmax run in float32, because their sums lose too much in bfloat16.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.models.positions import sinusoidal
from vdx.types import Array, DTypeLike, Float


def along_last(vector: Float[Array, "d"], x: Array) -> Array:
    """Reshape a vector to broadcast along the last axis of x."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def geglu(x: Float[Array, "*batch d2"]) -> Float[Array, "*batch d"]:
    """Gate the first half of the features by the second (Shazeer 2020)."""
    x, gate = jnp.split(x, 2, -1)
    return x * nn.gelu(gate, approximate=False)


def quick_gelu(x: Array) -> Array:
    """Approximate GELU by a sigmoid, as OpenAI's CLIP does."""
    return x * nn.sigmoid(1.702 * x)


def relu_squared(x: Array) -> Array:
    """Square the positive part (So et al. 2021, Primer)."""
    return jnp.square(nn.relu(x))


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Normalise the last axis without parameters, in float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + eps)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019)."""

    eps: float = 1e-6  # added to the mean square

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise x and return it in its dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (x32 * along_last(scale, x)).astype(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with scale and bias, in float32."""

    eps: float = 1e-6  # added to the variance

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise x and return it in its dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        y = layer_norm(x, self.eps) * along_last(scale, x) + along_last(bias, x)
        return y.astype(x.dtype)


class EmbedMLP(nn.Module):
    """The embedding of a number: sinusoid -> dense -> SiLU -> dense."""

    width: int  # features of the embedding
    sinusoid: int = 256  # features of the sinusoid

    @nn.compact
    def __call__(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """Embed numbers, in float32."""
        x = sinusoidal(x, self.sinusoid)  # float32: a bfloat16 time loses neighbouring steps
        x = nn.silu(nn.Dense(self.width, name="up", dtype=jnp.float32)(x))
        # Small at first (Peebles & Xie 2023): a large embedding would modulate at random.
        return nn.Dense(
            self.width, name="down", dtype=jnp.float32, kernel_init=nn.initializers.normal(0.02)
        )(x)


def add_vector(
    emb: Float[Array, "b *t d"], vector: Float[Array, "b *frames d"], t: int
) -> Float[Array, "b *out d"]:
    """Add a vector to the time embedding, in the calling module's scope.

    Args:
        emb: the time embedding, [b d], or [b t d] with one row for each of the t frames of tokens.
        vector: [b d], or [b t*k d] with one row for each frame of the clip.
        t: frames of tokens. With k > 1 a dense layer maps the k vectors of a frame of tokens to
            one.

    Returns:
        [b d], or [b t d] if either input has one row a frame.
    """
    # A vector of each clip.
    if vector.ndim == 2:
        return emb + (vector if emb.ndim == 2 else vector[:, None])

    # A vector of each frame, or of each frame of tokens.
    if vector.shape[1] > t:
        vector = vector.reshape(len(vector), t, -1)  # b t (k d)
        vector = nn.Dense(emb.shape[-1], name="frames", dtype=jnp.float32)(vector)
    return (emb if emb.ndim == 3 else emb[:, None]) + vector


class MLP(nn.Module):
    """dense -> activation -> dense."""

    hidden: int  # features between the layers
    activation: str = "gelu"  # a row of ACTIVATIONS
    dtype: DTypeLike = jnp.float32  # of the matrix products
    out: int | None = None  # features of the result; None: those of the input

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch f"]:
        """Map features to features."""
        h = nn.Dense(self.hidden, name="up", dtype=self.dtype)(x)
        h = ACTIVATIONS[self.activation](h)
        return nn.Dense(self.out or x.shape[-1], name="down", dtype=self.dtype)(h)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": nn.gelu,  # tanh form, as in Wan and T5
    "gelu_exact": partial(nn.gelu, approximate=False),  # BERT, CLIP ViT-H
    "quick_gelu": quick_gelu,  # OpenAI's CLIP
    "silu": nn.silu,
    "geglu": geglu,  # the U-Nets
    "relu2": relu_squared,  # the cheapest on a CPU
}
