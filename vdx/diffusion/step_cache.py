"""The step cache: network evaluations that are skipped while the prediction hardly changes.

After EasyCache (Zhou et al. 2025; TeaCache, Liu et al. 2024, measures the input of the first block
instead): between evaluations a network's prediction changes in proportion to its input, and the
factor changes slowly. So the change of a prediction is estimated before it is computed. EasyCache
accumulates the changes since the last evaluation; here the distance from that evaluation counts.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdx.types import Array


class StepCacheState(NamedTuple):
    """The last evaluation of the network."""

    x: Array  # its input [b t h w c]
    prediction: Array  # its output [b t h w c]
    rate: Array  # change of the prediction for a change of the input, [b]


class CachedStep(NamedTuple):
    """The result of one step of the sampler."""

    prediction: Array  # [b t h w c], of the network or extrapolated
    state: StepCacheState
    evaluated: Array  # bool []: whether the network was evaluated


@dataclasses.dataclass(frozen=True)
class StepCache:
    """The rule that decides, for all clips of a batch together, whether to evaluate the network.

    The network is evaluated when the estimated change of any clip's prediction reaches
    `threshold`. Otherwise the last prediction is moved by as much as the input has moved. These
    evaluations are required: the first two (they give the rate), the last, and the first on both
    sides of each end of `interval`.
    """

    threshold: float | Array  # change of a prediction relative to its size; 0: always evaluate
    interval: tuple[float, float] = (0.0, 1.0)  # times where guidance is on (see Guidance)

    def required(self, times: Array | np.ndarray) -> Array:
        """Return bool [n]: which of the evaluations at these times are required."""
        low, high = self.interval
        place = np.arange(len(times))
        inside = (times >= low) & (times <= high)
        turns = jnp.append(False, inside[1:] != inside[:-1])
        return (place < 2) | (place == len(times) - 1) | turns

    def start(self, x: Array) -> StepCacheState:
        """Return the state before the first evaluation, of inputs like x."""
        return StepCacheState(jnp.zeros_like(x), jnp.zeros_like(x), jnp.full(len(x), jnp.inf))

    def __call__(
        self,
        denoise: Callable[[Array, Array], Array],
        x: Array,
        t: Array,
        required: Array,
        state: StepCacheState,
    ) -> CachedStep:
        """Evaluate the network at (x, t), or extrapolates its last prediction."""
        moved = x - state.x
        change = state.rate * _size(moved) / _size(state.prediction)
        # Negated, so that a change that is not a number evaluates the network too.
        evaluate = required | ~jnp.all(change < self.threshold)

        def evaluated() -> tuple[Array, StepCacheState]:
            prediction = denoise(x, t)
            rate = _size(prediction - state.prediction) / _size(moved)
            return prediction, StepCacheState(x, prediction, rate)

        def extrapolated() -> tuple[Array, StepCacheState]:
            return state.prediction + moved, state

        prediction, state = jax.lax.cond(evaluate, evaluated, extrapolated)
        return CachedStep(prediction, state, evaluate)


def _size(x: Array) -> Array:
    """Return the mean of |x| of each clip, [b]."""
    return jnp.abs(x).reshape(len(x), -1).mean(1)
