"""The step cache: evaluations skipped while the prediction hardly changes.

After EasyCache (Zhou et al. 2025; TeaCache, Liu et al. 2024, measures the input of the first block
instead): between evaluations a network's prediction changes in proportion to its input, and the
factor changes slowly. So the change of a prediction is estimated before it is computed. EasyCache
accumulates the changes since the last evaluation; here the distance from that evaluation counts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdx.types import Array


class StepCacheState(NamedTuple):
    """The last evaluation of each clip."""

    x: Array  # its input [b t h w c]
    prediction: Array  # its output [b t h w c]
    rate: Array  # change of the prediction for a change of the input, [b]


class CachedStep(NamedTuple):
    """The result of one step of the sampler."""

    prediction: Array  # [b t h w c], of the network or extrapolated
    state: StepCacheState
    evaluated: Array  # bool [b]: clips whose prediction is of the network


@dataclasses.dataclass(frozen=True)
class StepCache:
    """The rule that decides whether to evaluate the network.

    It decides for each clip by itself, so that a clip is the same in any batch. A clip is evaluated
    when the estimated change of its prediction reaches `threshold`. Otherwise its last prediction
    is moved by as much as its input has moved. The network runs on the whole batch, unless no clip
    is evaluated. These evaluations are required: the first two (they give the rate), the last, and
    the first on both sides of each end of `interval`.
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
        """Evaluate the network at (x, t), or extrapolate, clip by clip."""
        moved = x - state.x
        change = state.rate * _size(moved) / _size(state.prediction)
        # Negated, so that a change that is not a number evaluates the network too.
        evaluate = required | ~(change < self.threshold)  # b

        def evaluated() -> StepCacheState:
            prediction = denoise(x, t)
            rate = _size(prediction - state.prediction) / _size(moved)
            fresh = StepCacheState(x, prediction, rate)
            return jax.tree.map(functools.partial(_select_clips, evaluate), fresh, state)

        state = jax.lax.cond(jnp.any(evaluate), evaluated, lambda: state)

        # A clip that was evaluated has not moved since.
        return CachedStep(state.prediction + (x - state.x), state, evaluate)


def _select_clips(chosen: Array, one: Array, other: Array) -> Array:
    """Return the chosen clips [b] of one array and the rest of the other."""
    return jnp.where(chosen.reshape(-1, *(1,) * (one.ndim - 1)), one, other)


def _size(x: Array) -> Array:
    """Return the mean of |x| of each clip, [b]."""
    return jnp.abs(x).reshape(len(x), -1).mean(1)
