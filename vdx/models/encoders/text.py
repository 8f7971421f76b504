"""Text encoders: trained with the denoiser, or frozen on the host.

A row of ENCODERS is trained with the denoiser. It has two methods:

    tokenizer()             returns a host function caption -> (ids int32 [l], mask bool [l])
    __call__(ids, mask)     [b l], [b l] -> (features [b m d], mask [b m])

A row of FROZEN runs on the host. Its `width` is d, and its `tokenizer()` returns a host function
caption -> (features [l d], mask bool [l]).
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError
from vdx.config.ranges import MAX_INT, Count, Index, Interval
from vdx.models.attention.layers import encoder_layers
from vdx.models.encoders.minilm import MiniLM
from vdx.models.layers import LayerNorm
from vdx.types import Array, Bool, Float, Int

Tokenize = Callable[[str], tuple[np.ndarray, np.ndarray]]
VOCABULARY = 384  # ByT5's: three special tokens, 256 bytes, and ids that no text uses
SPACE = 3 + ord(" ")  # its id


class ByteEncoder(nn.Module):
    """Text as UTF-8 bytes (the ByT5 vocabulary), trained together with the denoiser.

    It needs no files and reads every language. As in the Byte Latent Transformer (Pagnoni et al.
    2024), hashes of the n-grams that end at a byte are embedded with it, and bytes are pooled into
    words. A word then has its own direction from the first step: without that a short training
    learns colours but not verbs. Transformer layers over the words do the rest.
    """

    length: Annotated[int, Interval(2, MAX_INT)] = 64  # bytes kept of a caption, end token included
    words: Count = 24  # kept; the last one holds the rest of the text
    width: Count = 192  # features of a word
    depth: Index = 2  # layers over the words
    heads: Count = 6  # of attention; they divide the width
    ngrams: tuple[Count, ...] = (3, 4, 5)  # sizes, in bytes
    buckets: Count = 2048  # hashes of the n-grams of one size

    def tokenizer(self) -> Tokenize:
        """Return the host function caption -> (ids, mask) for the data pipeline."""
        from transformers import ByT5Tokenizer  # slow to import, and only the host needs it

        tokenizer = ByT5Tokenizer(extra_ids=0)

        def tokenize(caption: str) -> tuple[np.ndarray, np.ndarray]:
            out = tokenizer(caption, max_length=self.length, padding="max_length", truncation=True)
            ids = np.asarray(out["input_ids"], np.int32)
            return ids, np.asarray(out["attention_mask"], bool)

        return tokenize

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]
    ) -> tuple[Float[Array, "b w d"], Bool[Array, "b w"]]:
        """Return (features of words, mask, True on words)."""
        if self.width % self.heads:
            raise ConfigError(
                f"The text encoder 'bytes' has width = {self.width} over heads = "
                f"{self.heads}; choose a multiple."
            )

        # Embed bytes and the n-grams that end at them. [b l d]
        embed = partial(nn.Embed, features=self.width, embedding_init=nn.initializers.normal(1.0))
        x = embed(VOCABULARY, name="bytes")(ids)
        for n in self.ngrams:
            hashes = ngram_hashes(ids, n) % self.buckets
            x = x + embed(self.buckets, name=f"ngrams_{n}")(hashes)

        # Average the bytes of each word. [b w d]
        word = jnp.minimum(word_index(ids), self.words - 1)
        member = jax.nn.one_hot(word, self.words, axis=1) * mask[:, None]  # [b w l]
        count = member.sum(-1)
        x = jnp.einsum("bwl,bld->bwd", member, x) / jnp.maximum(count, 1.0)[..., None]
        is_word = count > 0

        x = LayerNorm(name="norm_in")(x)
        positions = self.param(
            "position_table", nn.initializers.normal(0.02), (self.words, self.width), jnp.float32
        )
        return encoder_layers(x + positions[None], is_word, self.depth, self.heads), is_word


def ngram_hashes(ids: Int[Array, "b l"], n: int) -> Int[Array, "b l"]:
    """Hash the n ids that end at each position.

    Ids before the first are zero. A hash is an int32 of at least 0.
    """
    h = jnp.zeros(ids.shape, jnp.uint32)
    for shift in range(n):
        earlier = jnp.pad(ids, ((0, 0), (shift, 0)))[:, : ids.shape[1]]
        h = h * np.uint32(1_000_003) + earlier.astype(jnp.uint32)
    h = h ^ (h >> 15)  # the low bits, which pick the bucket, depend on the high ones too
    return (h & np.uint32(0x7FFFFFFF)).astype(jnp.int32)


def word_index(ids: Int[Array, "b l"], longest: int = 12) -> Int[Array, "b l"]:
    """Return the number of each byte's word.

    A space ends its word, and so do `longest` bytes: otherwise a sentence without spaces would be
    one word.
    """
    position = jnp.arange(ids.shape[1])[None]
    after_space = jnp.pad(ids == SPACE, ((0, 0), (1, 0)))[:, :-1]
    start = jax.lax.cummax(jnp.where(after_space, position, 0), axis=1)
    starts_word = (position - start) % longest == 0
    return jnp.cumsum(starts_word, axis=1) - 1


ENCODERS: dict[str, Callable[..., nn.Module]] = {"bytes": ByteEncoder}
FROZEN: dict[str, Callable[..., MiniLM]] = {"minilm": MiniLM}
