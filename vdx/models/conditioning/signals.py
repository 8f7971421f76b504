"""Conditioning signals: one table; each says its batch key, its port and its null value.

`Conditioning` turns a batch into `Ports`. Any signal can be dropped clip by clip, in training
(classifier-free dropout) and in sampling (guidance), by the same `drop` masks.
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.models.conditioning.control_signals import CONTROL_SIGNALS, Clip, kept
from vdx.models.encoders.text import ENCODERS, FROZEN, Tokenize
from vdx.models.layers import MLP, LayerNorm
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


class ImageTokens(nn.Module):
    """Features of images from a frozen encoder (batch key `image_tokens` [b m features]), as Wan
    reads CLIP's: norm, MLP, norm. Port `image_tokens`.

    positions: learned ones for so many tokens, if m is always that (Wan first-last-frame: those
    of both images in a row); 0: none. Null value: features of zero.
    """

    width: int
    features: int = 1280
    positions: int = 0
    dropout: float = 0.1

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {"image_tokens": jnp.zeros((1, self.positions or 1, self.features))}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        x = kept(batch["image_tokens"], drop)
        if self.positions:
            if x.shape[1] != self.positions:
                raise ConfigError(
                    f"image_tokens has {x.shape[1]} tokens a clip; this model reads "
                    f"config.model.signals.image_tokens.positions = "
                    f"{self.positions}."
                )
            x = x + self.param(
                "position_table",
                nn.initializers.zeros,
                (self.positions, self.features),
                jnp.float32,
            )
        # The two norms have torch's default epsilon, unlike those of the blocks.
        x = LayerNorm(1e-5, name="norm_in")(x)
        x = MLP(self.features, "gelu_exact", out=self.width, name="project")(x)
        return Ports(image_tokens=LayerNorm(1e-5, name="norm_out")(x))


class Concat(nn.Module):
    """Channels beside the noisy clip (batch key `concat` [b t h w channels]), such as the latents
    of known frames and a mask that says which. Port `concat`. Null value: zeros."""

    width: int
    channels: int
    dropout: float = 0.0

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {"concat": jnp.zeros((1, *clip[:3], self.channels))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        return Ports(concat=kept(batch["concat"], drop))


class Control(nn.Module):
    """What control blocks read (batch key `control` [b t h w channels]), in Wan VACE the latents
    of what stays, of what changes, and a mask; in a U-Net maps of pixels. Port `control`. Null
    value: hints of weight 0.

    side: how many times as high and wide as the clip it is.
    """

    width: int
    channels: int
    side: int = 1
    dropout: float = 0.0

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        t, h, w = clip[:3]
        return {"control": jnp.zeros((1, t, h * self.side, w * self.side, self.channels))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        return Ports(
            control=kept(batch["control"], drop), control_scale=1.0 - drop.astype(jnp.float32)
        )


SIGNALS: dict[str, Callable[..., nn.Module]] = {
    "text": Text,
    "embeddings": Embeddings,
    "image_tokens": ImageTokens,
    "concat": Concat,
    "control": Control,
    **CONTROL_SIGNALS,
}
NULL = "conditioning/embeddings/null"  # the parameter that stands for a dropped caption
TEXT = ("text", "embeddings")  # what captions become, and what plain guidance strengthens


def _sum(values: list[Array]) -> Array:
    """Of vectors [b d], and [b t d] for each frame."""
    if any(v.ndim == 3 for v in values):
        values = [v if v.ndim == 3 else v[:, None] for v in values]
    return sum(values[1:], values[0])


def merge(ports: list[Ports]) -> Ports:
    """Several signals at one port: tokens and channels are concatenated, vector and add summed.
    Control blocks read the channels of all their signals, if there is one of these."""

    def gather(field, combine):
        values = [v for p in ports if (v := getattr(p, field)) is not None]
        return combine(values) if values else None

    tokens = [p for p in ports if p.tokens is not None]
    if any(p.tokens_mask is not None for p in tokens):  # then each needs one
        ports = [
            p
            if p.tokens is None or p.tokens_mask is not None
            else p.replace(tokens_mask=jnp.ones(p.tokens.shape[:2], bool))
            for p in ports
        ]
    along, channels = partial(jnp.concatenate, axis=1), partial(jnp.concatenate, axis=-1)
    rules = {
        "tokens": along,
        "tokens_mask": along,
        "image_tokens": along,
        "vector": _sum,
        "modulation": _sum,
        "concat": channels,
        "add": _sum,
        "control": channels,
        "control_scale": partial(functools.reduce, jnp.maximum),
    }
    return Ports(**{field: gather(field, combine) for field, combine in rules.items()})


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
        return build(
            {"name": signal, **self.signals[signal]},
            SIGNALS,
            f"config.model.signals.{signal}",
            width=self.width,
            **given,
        )

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        """A batch of one with the keys, types and feature sizes that the signals read, for a clip
        of (t, h, w, c)."""
        return {
            k: v
            for name in self.signals
            for k, v in self.row(name, parent=None).dummy_batch(clip).items()
        }

    @nn.nowrap
    def from_clip(self, key: PRNGKeyArray, x0: Array) -> Batch:
        """The entries of a training batch that signals make of its clips x0 [b t h w c]."""
        out: dict[str, Array] = {}
        for i, name in enumerate(self.signals):
            row = self.row(name, parent=None)
            if hasattr(row, "from_clip"):
                out |= row.from_clip(jax.random.fold_in(key, i), x0)
        return out

    @nn.nowrap
    def missing_signals(self, batch: Batch) -> set[str]:
        """Signals that a batch has nothing for. A text is always given. Raises ConfigError for
        one that this model cannot do without: it never saw it dropped."""
        rows = {name: self.row(name, parent=None) for name in self.signals if name not in TEXT}
        lost = {name for name, row in rows.items() if not set(row.dummy_batch()) <= set(batch)}
        for name in lost:
            if not rows[name].dropout:
                raise ConfigError(
                    f"This model was never trained without {name!r} "
                    f"(config.model.signals.{name}.dropout = 0): give it."
                )
        return lost

    @nn.nowrap
    def fill_missing(self, batch: Batch, shape: tuple[int, ...]) -> dict[str, Array]:
        """A batch for clips of `shape` [b t h w c] with an entry for every signal."""
        examples = {
            k: v
            for name in self.missing_signals(batch)
            for k, v in self.row(name, parent=None).dummy_batch(shape[1:]).items()
        }
        return {
            **batch,
            **{k: jnp.broadcast_to(v, (shape[0], *v.shape[1:])) for k, v in examples.items()},
        }

    @nn.nowrap
    def random_drop(self, key: PRNGKeyArray, batch_size: int) -> dict[str, Array]:
        """Each signal of each clip is dropped independently, with the signal's `dropout`."""
        rates = [self.row(name, parent=None).dropout for name in self.signals]
        return {
            name: jax.random.bernoulli(jax.random.fold_in(key, i), rate, (batch_size,))
            for i, (name, rate) in enumerate(zip(self.signals, rates, strict=True))
        }
