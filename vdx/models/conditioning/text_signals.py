"""Captions."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.models.conditioning.base import Clip
from vdx.models.encoders.text import ENCODERS, FROZEN, Tokenize
from vdx.models.layers import MLP
from vdx.types import Array, Batch, Bool, Ports

NULL = "conditioning/embeddings/null"  # the parameter that stands for a dropped caption


TEXT = ("text", "embeddings")  # what captions become, and what plain guidance strengthens


class Text(nn.Module):
    """Captions (batch keys `text`, `text_mask`) through an encoder trained with the denoiser.

    Port `tokens`; with `pooled`, the mean token also enters `vector`.
    Null value: the empty caption, encoded like any other.
    """

    width: int
    encoder: Mapping[str, Any]
    dropout: float = 0.1
    pooled: bool = True

    @nn.nowrap
    def net(self, **given):
        return build(self.encoder, ENCODERS, "config.model.signals.text.encoder", **given)

    @nn.nowrap
    def tokenizer(self) -> Tokenize:
        return self.net(parent=None).tokenizer()

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        length = self.net(parent=None).length
        return {"text": jnp.zeros((1, length), jnp.int32), "text_mask": jnp.ones((1, length), bool)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        ids, mask = batch["text"], batch["text_mask"]
        first = jnp.arange(ids.shape[1]) == 0
        ids = jnp.where(drop[:, None], first.astype(ids.dtype), ids)  # the end token is 1
        mask = jnp.where(drop[:, None], first, mask)
        x, mask = self.net(name="encoder")(ids, mask)
        tokens = MLP(self.width, out=self.width, name="project")(x)
        vector = None
        if self.pooled:
            weight = mask[..., None] / mask.sum(-1)[:, None, None]
            vector = nn.Dense(self.width, name="pool")((x * weight).sum(1))
        return Ports(tokens=tokens, tokens_mask=mask, vector=vector)


class Embeddings(nn.Module):
    """Text embeddings (batch key `text` [b l features]), computed once and stored with the
    clips, or by a frozen `encoder`, a row of FROZEN, while captions are read. Port `tokens`.

    length: captions are filled up with zeros to so many tokens and all of these are seen, as Wan
    has it; None: padding is masked. project: whether an MLP brings them to the network's width;
    Stable Diffusion reads them as they are. Null value: `null_tokens` learned tokens.
    """

    width: int
    features: int = 4096
    encoder: Mapping[str, Any] | None = None
    length: int | None = None
    project: bool = True
    null_tokens: int = 1
    dropout: float = 0.1

    @nn.nowrap
    def tokenizer(self) -> Tokenize:
        """Raises ConfigError without an encoder, or with one of another width."""
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
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        if self.encoder is not None:
            self.tokenizer()  # says now what is wrong with it
        n = self.null_tokens
        return {"text": jnp.zeros((1, n, self.features)), "text_mask": jnp.ones((1, n), bool)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        x = batch["text"].astype(jnp.float32)
        if x.shape[-1] != self.features:
            raise ConfigError(
                f"Cached text embeddings are {x.shape[-1]} wide; "
                f"config.model.signals.embeddings.features = {self.features}."
            )
        n = self.null_tokens
        shape = (self.features,) if n == 1 else (n, self.features)
        null = self.param("null", nn.initializers.normal(0.02), shape, jnp.float32)
        mask, longer = batch["text_mask"], ((0, 0), (0, max(0, n - x.shape[1])))
        x, mask = jnp.pad(x, (*longer, (0, 0))), jnp.pad(mask, longer)
        null = jnp.pad(null.reshape(n, -1), ((0, x.shape[1] - n), (0, 0)))
        x = jnp.where(drop[:, None, None], null, x)
        mask = jnp.where(drop[:, None], jnp.arange(x.shape[1]) < n, mask)
        project: Callable[[Array], Array] = (
            (lambda tokens: tokens)
            if not self.project
            else MLP(self.width, out=self.width, name="project")
        )
        if self.length is None:
            return Ports(tokens=project(x), tokens_mask=mask)
        short = self.length - x.shape[1]
        if short < 0:
            raise ConfigError(
                f"Text has {x.shape[1]} tokens; this model reads at most "
                f"config.model.signals.embeddings.length = {self.length}."
            )
        return Ports(tokens=project(jnp.pad(x * mask[..., None], ((0, 0), (0, short), (0, 0)))))
