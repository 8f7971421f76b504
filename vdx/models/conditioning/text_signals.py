"""Signals of captions."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.config.ranges import Count, Fraction
from vdx.models.conditioning.base import ONE_VALUE, ClipShape
from vdx.models.encoders.text import ENCODERS, FROZEN, Tokenize
from vdx.models.layers import MLP
from vdx.types import Array, Batch, Bool, Float, Ports

NULL = "conditioning/embeddings/null"  # the parameter that stands for a dropped caption
TEXT = ("text", "embeddings")  # the signals of captions, which plain guidance strengthens


class Text(nn.Module):
    """Captions through an encoder that is trained with the denoiser.

    Batch keys `text` and `text_mask` [b l]. Port `tokens`; with `pooled` also `vector`. Null value:
    the empty caption, encoded like any other.
    """

    width: int  # features of the network
    encoder: Mapping[str, Any]  # a row of ENCODERS with its fields
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training
    pooled: bool = True  # the mean token also enters `vector`

    @nn.nowrap
    def build_encoder(self, **fields: Any) -> Any:
        """Build the encoder; `parent=None` makes it free-standing."""
        return build(self.encoder, ENCODERS, "config.model.signals.text.encoder", **fields)

    @nn.nowrap
    def tokenizer(self) -> Tokenize:
        """Return the function caption -> (ids, mask)."""
        return self.build_encoder(parent=None).tokenizer()

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entries of one clip."""
        length = self.build_encoder(parent=None).length
        return {"text": jnp.zeros((1, length), jnp.int32), "text_mask": jnp.ones((1, length), bool)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Encode captions."""
        ids = batch["text"]  # b l
        mask = batch["text_mask"]

        # The empty caption is the end token, whose id is 1.
        is_first = (jnp.arange(ids.shape[1]) == 0)[None]
        ids = jnp.where(drop[:, None], is_first.astype(ids.dtype), ids)
        mask = jnp.where(drop[:, None], is_first, mask)

        x, mask = self.build_encoder(name="encoder")(ids, mask)
        tokens = MLP(self.width, out=self.width, name="project")(x)

        # The mean of the visible tokens.
        vector = None
        if self.pooled:
            weight = mask[..., None] / mask.sum(-1)[:, None, None]
            vector = nn.Dense(self.width, name="pool")((x * weight).sum(1))
        return Ports(tokens=tokens, tokens_mask=mask, vector=vector)


class Embeddings(nn.Module):
    """Text embeddings (batch key `text` [b l features]).

    They are computed once and stored with the clips, or computed by a frozen encoder while
    captions are read. Port `tokens`. Null value: learned tokens.
    """

    width: int  # features of the network
    features: Count = 4096  # of an embedding; UMT5-XXL
    encoder: Mapping[str, Any] | None = None  # a row of FROZEN with its fields
    # Captions are filled up to this many tokens with zeros, which are all visible, as in Wan. None:
    # padding is masked.
    length: Count | None = None
    project: bool = True  # map them by an MLP; Stable Diffusion reads them directly
    null_tokens: Count = 1  # learned tokens of the null value
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training

    @nn.nowrap
    def tokenizer(self) -> Tokenize:
        """Return the function caption -> (embeddings, mask) of the encoder.

        Raises:
            ConfigError: there is no encoder, or it has another width.
        """
        where = "config.model.signals.embeddings"
        if self.encoder is None:
            raise ConfigError(
                "The text of this model is cached embeddings, and nothing here "
                f"turns a caption into one. Set {where}.encoder.name to one of: "
                f"{', '.join(FROZEN)}."
            )
        encoder = build(self.encoder, FROZEN, f"{where}.encoder")
        if encoder.width != self.features:
            raise ConfigError(
                f"{where}.features = {self.features}, but its encoder "
                f"{self.encoder['name']!r} gives {encoder.width}."
            )
        return encoder.tokenizer()

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entries of one clip; checks the encoder."""
        if self.encoder is not None:
            self.tokenizer()
        n = self.null_tokens
        return {"text": jnp.zeros((1, n, self.features)), "text_mask": jnp.ones((1, n), bool)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Map embeddings to tokens.

        Raises:
            ConfigError: embeddings have another width, or more tokens than `length`.
        """
        x = batch["text"].astype(jnp.float32)  # b l features
        if x.shape[-1] != self.features:
            raise ConfigError(
                f"Cached text embeddings are {x.shape[-1]} wide; "
                f"config.model.signals.embeddings.features = {self.features}."
            )
        x, mask = self.with_null(x, batch["text_mask"], drop)

        tokens_mask: Array | None = mask  # with `length` padding is visible
        if self.length is not None:
            x = self.fill_up(x * mask[..., None])
            tokens_mask = None
        if self.project:
            x = MLP(self.width, out=self.width, name="project")(x)
        return Ports(tokens=x, tokens_mask=tokens_mask)

    def with_null(
        self, x: Float[Array, "b l f"], mask: Bool[Array, "b l"], drop: Bool[Array, "b"]
    ) -> tuple[Float[Array, "b k f"], Bool[Array, "b k"]]:
        """Replace dropped captions by the null tokens; both are padded to one length."""
        n = self.null_tokens
        shape = (self.features,) if n == 1 else (n, self.features)
        null = self.param("null", nn.initializers.normal(0.02), shape, jnp.float32)

        missing = ((0, 0), (0, max(0, n - x.shape[1])))
        x = jnp.pad(x, (*missing, (0, 0)))
        mask = jnp.pad(mask, missing)
        null = jnp.pad(null.reshape(n, -1), ((0, x.shape[1] - n), (0, 0)))

        is_null_token = (jnp.arange(x.shape[1]) < n)[None]
        x = jnp.where(drop[:, None, None], null[None], x)
        mask = jnp.where(drop[:, None], is_null_token, mask)
        return x, mask

    def fill_up(self, x: Float[Array, "b l f"]) -> Float[Array, "b k f"]:
        """Pad to `length` tokens with zeros.

        Raises:
            ConfigError: there are more tokens.
        """
        assert self.length is not None
        missing = self.length - x.shape[1]
        if missing < 0:
            raise ConfigError(
                f"Text has {x.shape[1]} tokens; this model reads at most "
                f"config.model.signals.embeddings.length = {self.length}."
            )
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0)))
