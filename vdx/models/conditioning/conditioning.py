"""The conditioning of a network: its signals, and the merging of their ports.

`Conditioning` maps a batch to `Ports`. Any signal can be dropped clip by clip, in training
(classifier-free dropout) and in sampling (guidance), by the same `drop` masks.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.models.conditioning.base import ONE_VALUE, ClipShape, Drop
from vdx.models.conditioning.table import SIGNALS
from vdx.models.conditioning.text_signals import TEXT
from vdx.types import Array, Batch, Bool, Float, Ports, PRNGKeyArray


class Conditioning(nn.Module):
    """Conditioning signals, with one set of parameters."""

    width: int  # features of the network
    signals: Mapping[str, Any]  # rows of SIGNALS -> their fields, as a config has them

    @nn.compact
    def __call__(self, batch: Batch, drop: Drop) -> Ports:
        """Map a batch to ports."""
        return merge([self.signal(name, name=name)(batch, drop[name]) for name in self.signals])

    @nn.nowrap
    def signal(self, signal: str, **fields: Any) -> Any:
        """Build the module of one signal; `parent=None` makes it free-standing."""
        where = f"config.model.signals.{signal}"
        spec = self.signals[signal]
        if not isinstance(spec, Mapping):
            raise ConfigError(f"{where} = {spec!r} is no section of fields.")
        return build(
            {"name": signal, **spec},
            SIGNALS,
            where,
            width=self.width,
            **fields,
        )

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return a batch of one with the keys, types and sizes of all signals."""
        batch: dict[str, Array] = {}
        for name in self.signals:
            batch |= self.signal(name, parent=None).dummy_batch(clip)
        return batch

    @nn.nowrap
    def from_clip(self, key: PRNGKeyArray, x0: Float[Array, "b t h w c"]) -> Batch:
        """Return the entries of a training batch that signals make from its clips."""
        entries: dict[str, Array] = {}
        for i, name in enumerate(self.signals):
            signal = self.signal(name, parent=None)
            if hasattr(signal, "from_clip"):
                entries |= signal.from_clip(jax.random.fold_in(key, i), x0)
        return entries

    @nn.nowrap
    def missing_signals(self, batch: Collection[str]) -> set[str]:
        """Return the signals for which a batch has no entry, of those that are not text.

        Raises:
            ConfigError: the model requires a missing signal, because it was never dropped in
                training.
        """
        missing = set()
        for name in self.signals:
            if name in TEXT:
                continue  # a text is always given

            signal = self.signal(name, parent=None)
            if set(signal.dummy_batch()) <= set(batch):
                continue

            # It is missing: it may be dropped, if it was in training.
            if not signal.dropout:
                raise ConfigError(
                    f"This model was never trained without {name!r} "
                    f"(config.model.signals.{name}.dropout = 0): give it."
                )
            missing.add(name)
        return missing

    @nn.nowrap
    def fill_missing(self, batch: Batch, shape: tuple[int, ...]) -> dict[str, Array]:
        """Return a batch for clips of `shape` [b t h w c] with an entry for every signal.

        The added entries are dummies; their signals must be dropped.
        """
        b, *clip = shape
        filled = dict(batch)
        for name in self.missing_signals(batch):
            for key, dummy in self.signal(name, parent=None).dummy_batch(tuple(clip)).items():
                filled[key] = jnp.broadcast_to(dummy, (b, *dummy.shape[1:]))
        return filled

    @nn.nowrap
    def random_drop(self, key: PRNGKeyArray, batch_size: int) -> dict[str, Bool[Array, "b"]]:
        """Drop each signal of each clip independently, with the signal's `dropout`."""
        drop = {}
        for i, name in enumerate(self.signals):
            rate = self.signal(name, parent=None).dropout
            drop[name] = jax.random.bernoulli(jax.random.fold_in(key, i), rate, (batch_size,))
        return drop


def merge(ports: list[Ports]) -> Ports:
    """Merge the ports of several signals.

    Tokens and channels are concatenated, other ports are summed. Control blocks read the channels
    of all their signals, with the largest scale.
    """
    # If one text has a mask, each needs one.
    if any(p.tokens is not None and p.tokens_mask is not None for p in ports):
        ports = [_with_tokens_mask(p) for p in ports]

    merged = {}
    for port, combine in MERGE.items():
        values = [getattr(p, port) for p in ports if getattr(p, port) is not None]
        if values:
            merged[port] = combine(values)
    return Ports(**merged)


def _with_tokens_mask(ports: Ports) -> Ports:
    """Give tokens without a mask one that is True."""
    if ports.tokens is None or ports.tokens_mask is not None:
        return ports
    return ports.replace(tokens_mask=jnp.ones(ports.tokens.shape[:2], bool))


def _sum(values: list[Array]) -> Array:
    """Sum arrays; vectors [b d] and those of each frame [b t d] broadcast."""
    if any(value.ndim == 3 for value in values):
        values = [value if value.ndim == 3 else value[:, None] for value in values]
    return reduce(jnp.add, values)


_concat_tokens = partial(jnp.concatenate, axis=1)
_concat_channels = partial(jnp.concatenate, axis=-1)

# port -> function of the list of its values
MERGE: dict[str, Callable[[list[Array]], Array]] = {
    "tokens": _concat_tokens,
    "tokens_mask": _concat_tokens,
    "image_tokens": _concat_tokens,
    "vector": _sum,
    "modulation": _sum,
    "concat": _concat_channels,
    "add": _sum,
    "control": _concat_channels,
    "control_scale": partial(reduce, jnp.maximum),
}
