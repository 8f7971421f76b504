"""The interface of signals."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from vdx.types import Array, Batch, Bool, Float, Int, Ports

ClipShape = tuple[int, ...]  # (t, h, w, c) of the noisy clip
ONE_VALUE: ClipShape = (1, 1, 1, 1)  # for the signals that do not depend on the clip's size
Drop = Mapping[str, Bool[Array, "b"]]  # signal -> True on the clips whose signal is dropped


@runtime_checkable
class Signal(Protocol):
    """A linen module `(width, **fields)` that maps entries of a batch to ports.

    Where a clip's signal is dropped, it returns the signal's null value. Some signals also have
    `from_clip(key, x0) -> entries`, which makes their entries of a training batch from its clips;
    those that read captions have `tokenizer() -> Tokenizer`.
    """

    dropout: float  # probability of dropping the signal of a clip in training

    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return a batch of one with the keys, types and sizes of the signal."""

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Map a batch to ports."""


def zero_dropped(
    x: Float[Array, "b *more"] | Int[Array, "b *more"], drop: Bool[Array, "b"]
) -> Float[Array, "b *more"]:
    """Return x in float32, zero where dropped."""
    dropped = drop.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(dropped, 0.0, x.astype(jnp.float32))
