"""Self-attention over sequences, and cross-attention to conditioning tokens."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from vdx.models.attention.backends import attend
from vdx.models.layers import MLP, LayerNorm, RMSNorm
from vdx.types import Array, Bool, DTypeLike, Float


class SelfAttention(nn.Module):
    """Attention over a padded sequence [b l d]; `mask` [b l] is True on tokens, None if all are.

    With `causal` a token sees itself and those before it, else all.
    """

    heads: int
    causal: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        d, split = x.shape[-1], (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        q, k, v = (nn.Dense(d, name=name, dtype=self.dtype)(x).reshape(split) for name in "qkv")
        y = attend(q, k, v, mask, causal=self.causal).reshape(x.shape)
        return nn.Dense(d, name="out", dtype=self.dtype)(y)


def encoder_layers(
    x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None, depth: int, heads: int
) -> Float[Array, "b l d"]:
    """Pre-norm layers of self-attention and MLP and a last norm, in the calling module's scope."""
    for i in range(depth):
        x = x + SelfAttention(heads, name=f"attention_{i}")(LayerNorm(name=f"norm_a{i}")(x), mask)
        x = x + MLP(4 * x.shape[-1], name=f"mlp_{i}")(LayerNorm(name=f"norm_b{i}")(x))
    return LayerNorm(name="norm")(x)


class CrossAttention(nn.Module):
    """Queries from the grid [b t h w d], keys and values from tokens [b l e].

    With image tokens [b m e] the same queries also attend to those, by keys and values of their
    own, and both answers are added (Ye et al. 2023, IP-Adapter; Wan image-to-video). qk_norm:
    queries and keys are RMS-normalised across all heads (Wan). attention: the backend, see attend.
    The keys and values are what the collection "cross_kv" holds, if it is given; made mutable it is
    filled.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    qk_norm: bool = True
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        tokens: Float[Array, "b l e"],
        mask: Bool[Array, "b l"] | None,
        image_tokens: Float[Array, "b m e"] | None = None,
    ) -> Float[Array, "b t h w d"]:
        width, (t, h, w) = x.shape[-1], x.shape[1:4]

        def keys_and_values(tokens: Array, prefix: str = "") -> tuple[Array, Array]:
            if self.has_variable("cross_kv", f"{prefix}kv"):
                return self.get_variable("cross_kv", f"{prefix}kv")
            k = nn.Dense(width, name=f"{prefix}k", dtype=self.dtype)(tokens)
            v = nn.Dense(width, name=f"{prefix}v", dtype=self.dtype)(tokens)
            if self.qk_norm:
                k = RMSNorm(name=f"{prefix}k_norm")(k)
            k, v = (rearrange(a, "b l (n d) -> b l n d", n=self.heads) for a in (k, v))
            if self.is_mutable_collection("cross_kv") and not self.is_initializing():
                self.put_variable("cross_kv", f"{prefix}kv", (k, v))
            return k, v

        q = nn.Dense(width, name="q", dtype=self.dtype)(x)
        if self.qk_norm:
            q = RMSNorm(name="q_norm")(q)
        q = rearrange(q, "b t h w (n d) -> b (t h w) n d", n=self.heads)
        y = attend(q, *keys_and_values(tokens), mask, backend=self.attention)
        if image_tokens is not None:
            y = y + attend(q, *keys_and_values(image_tokens, "image_"), backend=self.attention)
        y = rearrange(y, "b (t h w) n d -> b t h w (n d)", t=t, h=h, w=w)
        return nn.Dense(width, name="out", dtype=self.dtype)(y)
