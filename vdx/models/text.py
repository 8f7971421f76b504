"""Text encoders behind one interface: a row of ENCODERS turns token ids into features.

Each row has `tokenizer()`, a host function caption -> (ids int32 [l], mask bool [l]), used by
the data pipeline, and `__call__(ids [b l], mask [b l]) -> (features [b m d], mask [b m])`.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vdx.models.attention import attend
from vdx.models.layers import MLP, LayerNorm
from vdx.types import Array, Bool, Int

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]


class SelfAttention(nn.Module):
    """Bidirectional attention over a padded sequence [b l d]; `mask` [b l] is True on tokens."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        d, split = x.shape[-1], (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        q, k, v = (nn.Dense(d, name=name)(x).reshape(split) for name in "qkv")
        return nn.Dense(d, name="out")(attend(q, k, v, mask).reshape(x.shape))


class ByteEncoder(nn.Module):
    """Text as UTF-8 bytes (the ByT5 vocabulary), trained together with the denoiser.

    It needs no files and knows every language. Two convolutions see the letters around each
    byte and shorten the sequence by `stride`; transformer layers do the rest.
    """

    length: int = 64      # bytes kept of a caption, end token included
    width: int = 192
    depth: int = 2
    heads: int = 6
    stride: int = 4

    def tokenizer(self) -> Tokenize:
        from transformers import ByT5Tokenizer  # slow to import, and only the host needs it
        tokenizer = ByT5Tokenizer(extra_ids=0)

        def tokenize(caption: str) -> tuple[np.ndarray, np.ndarray]:
            out = tokenizer(caption, max_length=self.length, padding="max_length", truncation=True)
            return (np.asarray(out["input_ids"], np.int32),
                    np.asarray(out["attention_mask"], bool))

        return tokenize

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> tuple[Array, Array]:
        keep = mask[..., None]   # padding must not reach the convolutions
        x = nn.Embed(384, self.width, name="bytes")(ids) * keep
        x = nn.gelu(nn.Conv(self.width, (5,), name="local")(x)) * keep
        x = nn.Conv(self.width, (self.stride,), self.stride, name="shorten")(x)
        mask = mask.reshape(mask.shape[0], -1, self.stride).any(-1)
        x = x + self.param("position_table", nn.initializers.normal(0.02),
                           (x.shape[1], self.width), jnp.float32)
        for i in range(self.depth):
            x = x + SelfAttention(self.heads, name=f"attention_{i}")(
                LayerNorm(name=f"norm_a{i}")(x), mask)
            x = x + MLP(4 * self.width, name=f"mlp_{i}")(LayerNorm(name=f"norm_b{i}")(x))
        return LayerNorm(name="norm")(x), mask


ENCODERS: dict[str, Callable[..., nn.Module]] = {"bytes": ByteEncoder}
