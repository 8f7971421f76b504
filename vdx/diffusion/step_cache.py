"""Evaluations of the network that are not made: what the last one added stands for them.

After EasyCache (Zhou et al. 2025; TeaCache, Liu et al. 2024, measures the input of the first block
instead): from one evaluation to the next a network's answer changes in proportion to its input,
and the factor changes slowly. So the change of an answer is known before it is asked for. EasyCache
adds up the changes since the last evaluation; here it is the distance from it that counts.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdx.types import Array


class StepCacheState(NamedTuple):
    """The last evaluation: its input and answer [b t h w c], and by how much answers change
    for a change of the input [b]."""

    x: Array
    answer: Array
    rate: Array


@dataclasses.dataclass(frozen=True)
class StepCache:
    """Whether to ask the network, for all clips of a batch alike.

    It is asked when the answer of one of the clips would change by `threshold` of its size or
    more, as far as can be told; else the answer is the last one, moved as far as the input is.
    Always asked are the first two evaluations, by which the rate is known, the last one, and the
    first ones on both sides of the ends of `interval`, where guidance changes (see Guidance).
    """

    threshold: float | Array
    interval: tuple[float, float] = (0.0, 1.0)

    def must(self, times: Array | np.ndarray) -> Array:
        """bool [n]: which of the evaluations at these times have to be made."""
        place, (low, high) = np.arange(len(times)), self.interval
        inside = (times >= low) & (times <= high)
        turns = jnp.append(False, inside[1:] != inside[:-1])
        return (place < 2) | (place == len(times) - 1) | turns

    def start(self, x: Array) -> StepCacheState:
        return StepCacheState(jnp.zeros_like(x), jnp.zeros_like(x), jnp.full(len(x), jnp.inf))

    def __call__(
        self,
        denoise: Callable[[Array, Array], Array],
        x: Array,
        t: Array,
        must: Array,
        memory: StepCacheState,
    ) -> tuple[Array, StepCacheState, Array]:
        """(prediction, memory, whether the network was asked)"""
        moved = x - memory.x
        change = memory.rate * _size(moved) / _size(memory.answer)
        ask = must | ~jnp.all(change < self.threshold)  # also where it is no number

        def asked() -> tuple[Array, StepCacheState]:
            answer = denoise(x, t)
            return answer, StepCacheState(x, answer, _size(answer - memory.answer) / _size(moved))

        prediction, memory = jax.lax.cond(ask, asked, lambda: (memory.answer + moved, memory))
        return prediction, memory, ask


def _size(x: Array) -> Array:
    """Mean of |x| of each clip, [b]."""
    return jnp.abs(x).reshape(len(x), -1).mean(1)
