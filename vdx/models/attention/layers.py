"""Self-attention over sequences, and cross-attention to conditioning tokens."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from vdx.models.attention.backends import attend
from vdx.models.layers import MLP, LayerNorm, RMSNorm
from vdx.types import Array, Bool, DTypeLike, Float


class SelfAttention(nn.Module):
    """Attention over a padded sequence."""

    heads: int  # of attention
    causal: bool = False  # a token attends to itself and those before it; otherwise to all
    dtype: DTypeLike = jnp.float32  # of the matrix products

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        """Attend; the mask is True on tokens, and None if all are."""
        b, length, width = x.shape
        split = (b, length, self.heads, width // self.heads)
        q, k, v = (nn.Dense(width, name=name, dtype=self.dtype)(x).reshape(split) for name in "qkv")
        y = attend(q, k, v, mask, causal=self.causal).reshape(x.shape)
        return nn.Dense(width, name="out", dtype=self.dtype)(y)


def encoder_layers(
    x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None, depth: int, heads: int
) -> Float[Array, "b l d"]:
    """Run pre-norm layers of self-attention and MLP, then a norm.

    Their parameters are in the calling module's scope.
    """
    for i in range(depth):
        x = x + SelfAttention(heads, name=f"attention_{i}")(LayerNorm(name=f"norm_a{i}")(x), mask)
        x = x + MLP(4 * x.shape[-1], name=f"mlp_{i}")(LayerNorm(name=f"norm_b{i}")(x))
    return LayerNorm(name="norm")(x)


class KeysValues(NamedTuple):
    """Keys and values of conditioning tokens, split into heads."""

    keys: Float[Array, "b l n d"]
    values: Float[Array, "b l n d"]


class CrossAttention(nn.Module):
    """Attention from the token grid to conditioning tokens.

    With image tokens the same queries also attend to those, by keys and values of their own, and
    both results are added (Ye et al. 2023, IP-Adapter; Wan image-to-video). Keys and values are
    read from the collection "cross_kv" if it is given, and written to it if it is mutable.
    """

    heads: int  # of attention
    dtype: DTypeLike = jnp.float32  # of the matrix products
    qk_norm: bool = True  # RMS-normalise queries and keys across all heads (Wan)
    attention: str = "auto"  # the backend, as in `attend`

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        tokens: Float[Array, "b l e"],
        mask: Bool[Array, "b l"] | None,
        image_tokens: Float[Array, "b m f"] | None = None,
    ) -> Float[Array, "b t h w d"]:
        """Attend; the mask is True on visible tokens, and None if all are."""
        width = x.shape[-1]
        t, h, w = x.shape[1:4]

        # Queries of the grid, as one sequence.
        q = nn.Dense(width, name="q", dtype=self.dtype)(x)
        if self.qk_norm:
            q = RMSNorm(name="q_norm")(q)
        q = rearrange(q, "b t h w (n d) -> b (t h w) n d", n=self.heads)

        # Both attentions, summed.
        kv = self.keys_values(tokens, width)
        y = attend(q, kv.keys, kv.values, mask, backend=self.attention)
        if image_tokens is not None:
            kv = self.keys_values(image_tokens, width, "image_")
            y = y + attend(q, kv.keys, kv.values, backend=self.attention)

        y = rearrange(y, "b (t h w) n d -> b t h w (n d)", t=t, h=h, w=w)
        return nn.Dense(width, name="out", dtype=self.dtype)(y)

    def keys_values(
        self, tokens: Float[Array, "b l e"], width: int, prefix: str = ""
    ) -> KeysValues:
        """Return keys and values, from the collection "cross_kv" if they are in it."""
        name = f"{prefix}kv"
        if self.has_variable("cross_kv", name):
            return KeysValues(*self.get_variable("cross_kv", name))

        k = nn.Dense(width, name=f"{prefix}k", dtype=self.dtype)(tokens)
        v = nn.Dense(width, name=f"{prefix}v", dtype=self.dtype)(tokens)
        if self.qk_norm:
            k = RMSNorm(name=f"{prefix}k_norm")(k)
        k, v = (rearrange(a, "b l (n d) -> b l n d", n=self.heads) for a in (k, v))

        if self.is_mutable_collection("cross_kv") and not self.is_initializing():
            self.put_variable("cross_kv", name, (k, v))
        return KeysValues(k, v)
