"""Text encoders. ENCODERS are trained with the denoiser, FROZEN ones run on the host.

A row of ENCODERS has `tokenizer()`, a host function caption -> (ids int32 [l], mask bool [l])
for the data pipeline, and `__call__(ids [b l], mask [b l]) -> (features [b m d], mask [b m])`.
A row of FROZEN has `width` d and a `tokenizer()` that gives features [l d] in place of ids.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError
from vdx.models.attention.layers import encoder_layers
from vdx.models.encoders.minilm import MiniLM
from vdx.models.layers import LayerNorm
from vdx.types import Array, Bool, Int

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]
SPACE = 3 + ord(" ")  # ByT5 ids: three special tokens, then the bytes


class ByteEncoder(nn.Module):
    """Text as UTF-8 bytes (the ByT5 vocabulary), trained together with the denoiser.

    It needs no files and knows every language. As in the Byte Latent Transformer (Pagnoni et
    al. 2024), hashes of the n-grams that end at a byte are embedded with it, and bytes are
    pooled into words, so a word has its own direction from the first step: without that a short
    training learns colours but not verbs. Transformer layers over the words do the rest.
    """

    length: int = 64  # bytes kept of a caption, end token included
    words: int = 24  # kept; the last one holds what is beyond
    width: int = 192
    depth: int = 2
    heads: int = 6
    ngrams: tuple[int, ...] = (3, 4, 5)
    buckets: int = 2048  # hashes of the n-grams of one size

    def tokenizer(self) -> Tokenize:
        from transformers import ByT5Tokenizer  # slow to import, and only the host needs it

        tokenizer = ByT5Tokenizer(extra_ids=0)

        def tokenize(caption: str) -> tuple[np.ndarray, np.ndarray]:
            out = tokenizer(caption, max_length=self.length, padding="max_length", truncation=True)
            return (np.asarray(out["input_ids"], np.int32), np.asarray(out["attention_mask"], bool))

        return tokenize

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> tuple[Array, Array]:
        if self.width % self.heads:
            raise ConfigError(
                f"The text encoder 'bytes' has width = {self.width} over heads = "
                f"{self.heads}; choose a multiple."
            )
        embed = partial(nn.Embed, features=self.width, embedding_init=nn.initializers.normal(1.0))
        x = embed(384, name="bytes")(ids)
        for n in self.ngrams:
            x = x + embed(self.buckets, name=f"ngrams_{n}")(ngram_hashes(ids, n) % self.buckets)
        word = jnp.minimum(word_index(ids), self.words - 1)
        member = jax.nn.one_hot(word, self.words, axis=1) * mask[:, None]  # b w l
        count = member.sum(-1)
        x = jnp.einsum("bwl,bld->bwd", member, x) / jnp.maximum(count, 1.0)[..., None]
        mask = count > 0
        x = LayerNorm(name="norm_in")(x)
        x = x + self.param(
            "position_table", nn.initializers.normal(0.02), (self.words, self.width), jnp.float32
        )
        return encoder_layers(x, mask, self.depth, self.heads), mask


def ngram_hashes(ids: Int[Array, "b l"], n: int) -> Int[Array, "b l"]:
    """A hash of the n ids that end at each place, nothing before the first; not negative."""
    h = jnp.zeros(ids.shape, jnp.uint32)
    for reshard_to_frames in range(n):
        earlier = jnp.pad(ids, ((0, 0), (reshard_to_frames, 0)))[:, : ids.shape[1]]
        h = h * np.uint32(1_000_003) + earlier.astype(jnp.uint32)
    return ((h ^ (h >> 15)) & np.uint32(0x7FFFFFFF)).astype(jnp.int32)


def word_index(ids: Int[Array, "b l"], longest: int = 12) -> Int[Array, "b l"]:
    """Which word each byte belongs to. A space ends its word, and so do `longest` bytes, or a
    sentence without spaces would be one word."""
    place = jnp.arange(ids.shape[1])
    ends = jnp.pad(ids == SPACE, ((0, 0), (1, 0)))[:, :-1]  # the byte before
    start = jax.lax.cummax(jnp.where(ends, place, 0), axis=1)
    starts = (place - start) % longest == 0
    return jnp.cumsum(starts, axis=1) - 1


ENCODERS: dict[str, Callable[..., nn.Module]] = {"bytes": ByteEncoder}
FROZEN: dict[str, Callable[..., MiniLM]] = {"minilm": MiniLM}
