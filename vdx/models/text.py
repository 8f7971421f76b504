"""Text encoders. ENCODERS are trained with the denoiser, FROZEN ones run on the host.

A row of ENCODERS has `tokenizer()`, a host function caption -> (ids int32 [l], mask bool [l])
for the data pipeline, and `__call__(ids [b l], mask [b l]) -> (features [b m d], mask [b m])`.
A row of FROZEN has `width` d and a `tokenizer()` that gives features [l d] in place of ids.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vdx.build import ConfigError
from vdx.models.attention import SelfAttention
from vdx.models.layers import MLP, LayerNorm
from vdx.models.minilm import MiniLM
from vdx.types import Array, Bool, Int

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]


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
        if self.length % self.stride or self.width % self.heads:
            raise ConfigError(f"The text encoder 'bytes' has length = {self.length} over stride = "
                              f"{self.stride} and width = {self.width} over heads = {self.heads}; "
                              "choose multiples.")
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
FROZEN: dict[str, Callable[..., MiniLM]] = {"minilm": MiniLM}
