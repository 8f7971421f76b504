"""Conditioning."""

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.models.conditioning.base import Clip
from vdx.models.conditioning.table import SIGNALS
from vdx.models.conditioning.text_signals import TEXT
from vdx.types import Array, Batch, Bool, Ports, PRNGKeyArray

Drop = Mapping[str, Bool[Array, "b"]]


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
