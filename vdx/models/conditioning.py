"""Conditioning signals: one table; each says its batch key, its port and its null value.

`Conditioning` turns a batch into `Ports`. Any signal can be dropped clip by clip, in training
(classifier-free dropout) and in sampling (guidance), by the same `drop` masks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.build import ConfigError, build
from vdx.models.layers import MLP, EmbedMLP
from vdx.models.text import ENCODERS, FROZEN, Tokenize
from vdx.types import Array, Batch, Bool, Ports, PRNGKeyArray

Drop = Mapping[str, Bool[Array, "b"]]


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
    def example(self) -> Batch:
        length = self.net(parent=None).length
        return {"text": jnp.zeros((1, length), jnp.int32), "text_mask": jnp.ones((1, length), bool)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        ids, mask = batch["text"], batch["text_mask"]
        first = jnp.arange(ids.shape[1]) == 0
        ids = jnp.where(drop[:, None], first.astype(ids.dtype), ids)    # the end token is 1
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

    Null value: one learned token.
    """

    width: int
    features: int = 4096
    encoder: Mapping[str, Any] | None = None
    dropout: float = 0.1

    @nn.nowrap
    def tokenizer(self) -> Tokenize:
        """Raises ConfigError without an encoder, or with one of another width."""
        where = "config.model.signals.embeddings"
        if self.encoder is None:
            raise ConfigError("The text of this model is cached embeddings, and nothing here "
                              f"turns a caption into one. Set {where}.encoder.name to one of: "
                              f"{', '.join(FROZEN)}.")
        encoder = build(self.encoder, FROZEN, f"{where}.encoder")
        if encoder.width != self.features:
            raise ConfigError(f"{where}.features = {self.features}, but its encoder "
                              f"{self.encoder['name']!r} gives {encoder.width}.")
        return encoder.tokenizer()

    @nn.nowrap
    def example(self) -> Batch:
        if self.encoder is not None:
            self.tokenizer()           # says now what is wrong with it
        return {"text": jnp.zeros((1, 1, self.features)), "text_mask": jnp.ones((1, 1), bool)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        x = batch["text"].astype(jnp.float32)
        if x.shape[-1] != self.features:
            raise ConfigError(f"Cached text embeddings are {x.shape[-1]} wide; "
                              f"config.model.signals.embeddings.features = {self.features}.")
        null = self.param("null", nn.initializers.normal(0.02), (self.features,), jnp.float32)
        first = jnp.arange(x.shape[1]) == 0
        x = jnp.where(drop[:, None, None], null * first[:, None], x)
        mask = jnp.where(drop[:, None], first, batch["text_mask"])
        return Ports(tokens=MLP(self.width, out=self.width, name="project")(x), tokens_mask=mask)


class Scalar(nn.Module):
    """A positive number per clip, on a log scale. Port `vector`. Null value: a learned vector."""

    width: int
    dropout: float = 0.1
    key = ""

    @nn.nowrap
    def example(self) -> Batch:
        return {self.key: jnp.ones(1)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        value = jnp.log2(batch[self.key].astype(jnp.float32))
        # 100 a doubling: the sinusoid then tells neighbouring rates apart.
        emb = EmbedMLP(self.width, name="embed")(100.0 * value)
        null = self.param("null", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        return Ports(vector=jnp.where(drop[:, None], null, emb))


class FrameRate(Scalar):
    """Frames per second of the clip (batch key `fps`)."""

    key = "fps"


class Duration(Scalar):
    """Number of pixel frames of the clip (batch key `num_frames`)."""

    key = "num_frames"


SIGNALS: dict[str, Callable[..., nn.Module]] = {
    "text": Text,
    "embeddings": Embeddings,
    "fps": FrameRate,
    "num_frames": Duration,
}


def merge(ports: list[Ports]) -> Ports:
    """Several signals at one port: tokens and concat are concatenated, vector and add summed."""
    def gather(field):
        return [v for p in ports if (v := getattr(p, field)) is not None]

    tokens, masks, concat = gather("tokens"), gather("tokens_mask"), gather("concat")
    return Ports(
        tokens=jnp.concatenate(tokens, 1) if tokens else None,
        tokens_mask=jnp.concatenate(masks, 1) if masks else None,
        vector=sum(v) if (v := gather("vector")) else None,
        concat=jnp.concatenate(concat, -1) if concat else None,
        add=sum(v) if (v := gather("add")) else None)


class Conditioning(nn.Module):
    """Batch -> Ports. `signals` maps rows of SIGNALS to their fields, as in the config."""

    width: int
    signals: Mapping[str, Mapping[str, Any]]

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop) -> Ports:
        return merge([self.row(name, name=name)(batch, drop[name]) for name in self.signals])

    @nn.nowrap
    def row(self, signal: str, **given) -> Any:
        """The module of one signal; `parent=None` makes it free-standing."""
        return build({"name": signal, **self.signals[signal]}, SIGNALS,
                     f"config.model.signals.{signal}", width=self.width, **given)

    @nn.nowrap
    def example(self) -> Batch:
        """A batch of one with the keys, types and feature sizes that the signals read."""
        return {k: v for name in self.signals
                for k, v in self.row(name, parent=None).example().items()}

    @nn.nowrap
    def random_drop(self, key: PRNGKeyArray, batch_size: int) -> dict[str, Array]:
        """Each signal of each clip is dropped independently, with the signal's `dropout`."""
        rates = [self.row(name, parent=None).dropout for name in self.signals]
        return {name: jax.random.bernoulli(jax.random.fold_in(key, i), rate, (batch_size,))
                for i, (name, rate) in enumerate(zip(self.signals, rates, strict=True))}
