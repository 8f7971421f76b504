"""Training losses: the weighted error of a prediction, and its report by noise level.

A weight multiplies the squared error in the space that the network predicts. An error e there
is an error sigma / determinant * e in x0 (see Process.determinant), so a weight that is stated
for one prediction holds for all.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vdx.diffusion.process import FLOOR, Process, expand
from vdx.types import Array


@dataclasses.dataclass(frozen=True)
class NoWeight:
    """1 everywhere: the plain loss of Ho et al. 2020 for noise, of flow matching for velocity."""

    def __call__(self, process: Process, t: Array) -> Array:
        return jnp.ones(jnp.shape(t), jnp.float32)


@dataclasses.dataclass(frozen=True)
class MinSNR:
    """min(snr, gamma) on the x0 error (Hang et al. 2023).

    That is min(snr, gamma) / snr for noise and min(snr, gamma) / (snr + 1) for v of a
    variance preserving process. The shape of t; finite at both ends.
    """

    gamma: float = 5.0

    def __call__(self, process: Process, t: Array) -> Array:
        # min(alpha^2 / sigma^2, gamma) * sigma^2 / determinant^2, with no 0 / 0 at an end.
        alpha = jnp.maximum(process.alpha(t), FLOOR)
        sigma = jnp.maximum(process.sigma(t), FLOOR)
        bottom = jnp.maximum(process.determinant(t), FLOOR)
        return jnp.minimum(alpha**2, self.gamma * sigma**2) / bottom**2


@dataclasses.dataclass(frozen=True)
class VelocityWeight:
    """Makes the loss that of the velocity, whatever is predicted (Li & He 2025).

    The velocity is noise - x0 for rectified flow and v for a variance preserving process.
    An x0 prediction divides by sigma and a noise prediction by alpha; that divisor is kept
    above `min_sigma`, so the weight is finite. The shape of t.
    """

    min_sigma: float = 0.05

    def __call__(self, process: Process, t: Array) -> Array:
        top = process.determinant(t, process.velocity_kind)
        return (top / jnp.maximum(process.determinant(t), self.min_sigma)) ** 2


WEIGHTINGS = {"none": NoWeight, "min_snr": MinSNR, "velocity": VelocityWeight}


def denoising_error(
    process: Process, weight: Any, prediction: Array, x0: Array, noise: Array, t: Array
) -> Array:
    """Weighted squared error, float32 [b t h w c].

    `prediction`, `x0` and `noise` are [b t h w c] in any float type, t is [b] or [b t].
    """
    target = process.from_x0_noise(x0, noise, t)
    error = jnp.square(prediction.astype(jnp.float32) - target)
    return expand(weight(process, t), error) * error


def denoising_loss(
    process: Process,
    weight: Any,
    prediction: Array,
    x0: Array,
    noise: Array,
    t: Array,
    loss_mask: Array | None = None,
) -> Array:
    """The mean of `denoising_error` over t h w c, float32 [b]; over the frames alone that
    `learnt`, bool [b t], says."""
    error = denoising_error(process, weight, prediction, x0, noise, t)
    where = None if loss_mask is None else loss_mask[:, :, None, None, None]
    return jnp.mean(error, axis=range(1, error.ndim), where=where)


def bin_by_time(values: Array, t: Array, bins: int) -> tuple[Array, Array]:
    """(sums [bins], counts [bins]) in float32 of values [n] whose t [n] is in each 1/bins.

    Sums and counts add up over batches and hosts, means would not.
    """
    index = jnp.clip(jnp.floor(t * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=jnp.float32)
    return jnp.sum(member * values[:, None], axis=0), jnp.sum(member, axis=0)
