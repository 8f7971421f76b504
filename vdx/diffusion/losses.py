"""Training losses: the terms of `config.loss` and their weightings.

A term gives one number per clip, or one per frame where every frame has a time of its own; the
objective sums the weighted terms. A weighting multiplies the squared error in the space that the
network predicts. An error e there is an error sigma / determinant * e in x0 (see
Process.determinant), so a weighting that is stated for one prediction holds for all.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vdx.config.build import build
from vdx.config.ranges import NonNegative, Positive, PositiveFraction
from vdx.diffusion.process import FLOOR, Process, expand
from vdx.types import Array, Bool, Float

__all__ = [
    "LOSS_TERMS",
    "WEIGHTINGS",
    "DenoisingLoss",
    "FrameTimes",
    "LossTerm",
    "MinSNR",
    "NoWeight",
    "VelocityWeight",
    "Weighting",
    "bin_by_time",
    "denoising_error",
    "mean_over_frames",
    "shared_times",
]


class FrameTimes(NamedTuple):
    """The noise levels of a batch of clips, and the frames that are learned from.

    Whether frames of one clip may differ is read from `masked` and from the ranks of `compact_t`
    and `report_t`, which are fixed when the step is traced, never from values.
    """

    t: Float[Array, "b t"]  # diffusion time of every frame, in [0, 1]
    loss_mask: Bool[Array, "b t"]  # True: the frame enters the loss
    # `t` without the axis of frames where all frames of a clip share it: the same numbers for less.
    compact_t: Float[Array, "b"] | Float[Array, "b t"]
    report_t: Float[Array, "b"] | Float[Array, "b t"]  # times of the losses: a clip's, a frame's
    masked: bool = False  # False: `loss_mask` is True everywhere, and the program is spared it


def shared_times(t: Float[Array, "b"], num_frames: int) -> FrameTimes:
    """Give every frame of a clip the clip's time; every frame is learned from."""
    shape = (t.shape[0], num_frames)
    return FrameTimes(
        t=jnp.broadcast_to(t[:, None], shape),
        loss_mask=jnp.ones(shape, bool),
        compact_t=t,
        report_t=t,
    )


@runtime_checkable
class Weighting(Protocol):
    """A weight of the squared error as a function of the diffusion time."""

    def __call__(self, process: Process, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return the weights at times t, float32."""
        ...


@dataclasses.dataclass(frozen=True)
class NoWeight:
    """1 everywhere: the plain loss.

    That is the loss of Ho et al. 2020 for noise, and of flow matching for velocity.
    """

    def __call__(self, process: Process, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return ones."""
        return jnp.ones(jnp.shape(t), jnp.float32)


@dataclasses.dataclass(frozen=True)
class MinSNR:
    """min(snr, gamma) on the x0 error (Hang et al. 2023).

    That is min(snr, gamma) / snr for noise and min(snr, gamma) / (snr + 1) for v of a
    variance preserving process.
    """

    gamma: Positive = 5.0  # the paper's value; larger trains more at low noise

    def __call__(self, process: Process, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return the weights at times t, finite at both ends."""
        # min(alpha^2 / sigma^2, gamma) * sigma^2 / determinant^2, with no 0 / 0 at an end.
        alpha = jnp.maximum(process.alpha(t), FLOOR)
        sigma = jnp.maximum(process.sigma(t), FLOOR)
        determinant = jnp.maximum(process.determinant(t), FLOOR)
        return jnp.minimum(alpha**2, self.gamma * sigma**2) / determinant**2


@dataclasses.dataclass(frozen=True)
class VelocityWeight:
    """The weight that makes any loss that of the velocity (Li & He 2025).

    The velocity is noise - x0 for rectified flow and v for a variance preserving process.
    An x0 prediction divides by sigma and a noise prediction by alpha.
    """

    min_sigma: PositiveFraction = 0.05  # the divisor's lower bound, so that the weight is finite

    def __call__(self, process: Process, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Return the weights at times t."""
        velocity = process.determinant(t, process.velocity_kind)
        own = jnp.maximum(process.determinant(t), self.min_sigma)
        return (velocity / own) ** 2


# name -> a dataclass whose instances are weightings.
WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "none": NoWeight,
    "min_snr": MinSNR,
    "velocity": VelocityWeight,
}


def denoising_error(
    process: Process,
    weighting: Weighting,
    prediction: Float[Array, "b t h w c"],
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    t: Float[Array, "b"] | Float[Array, "b t"],
) -> Float[Array, "b t h w c"]:
    """Return the weighted squared error of a prediction, in float32."""
    target = process.from_x0_noise(x0, noise, t)
    error = jnp.square(prediction.astype(jnp.float32) - target)
    return expand(weighting(process, t), error) * error


def mean_over_frames(
    error: Float[Array, "b t h w c"], times: FrameTimes
) -> Float[Array, "b"] | Float[Array, "b t"]:
    """Return the mean error of the learned frames, in the shape of `times.report_t`."""
    if not times.masked:
        return jnp.mean(error, axis=range(times.report_t.ndim, error.ndim))

    # A frame outside the mask has no mean of its own.
    assert times.report_t.ndim == 1
    loss_mask = times.loss_mask
    where = loss_mask[:, :, None, None, None]
    values_per_frame = math.prod(error.shape[2:])
    count = values_per_frame * jnp.sum(loss_mask, axis=1, dtype=jnp.float32)  # b
    return jnp.sum(error, axis=(1, 2, 3, 4), where=where) / count


@runtime_checkable
class LossTerm(Protocol):
    """One term of the training loss, a row of LOSS_TERMS.

    Perceptual, flow-consistency and adversarial terms belong here: each is a frozen dataclass
    that measures one disagreement between the prediction and the clip.
    """

    @property
    def weight(self) -> float:
        """The factor of the term in the summed loss."""
        ...

    def __call__(
        self,
        process: Process,
        prediction: Float[Array, "b t h w c"],
        x0: Float[Array, "b t h w c"],
        noise: Float[Array, "b t h w c"],
        times: FrameTimes,
    ) -> Float[Array, "b"] | Float[Array, "b t"]:
        """Return the unweighted loss, float32, in the shape of `times.report_t`."""
        ...


@dataclasses.dataclass(frozen=True)
class DenoisingLoss:
    """The weighted squared error of the network's prediction."""

    weight: NonNegative = 1.0  # factor in the summed loss
    # A row of WEIGHTINGS with its fields: the weight of each noise level.
    weighting: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "none"})

    def __post_init__(self) -> None:
        _ = self.weigh  # raises ConfigError for an unknown weighting

    @functools.cached_property
    def weigh(self) -> Weighting:
        """The weighting as an object."""
        return build(self.weighting, WEIGHTINGS, "config.loss.denoising.weighting")

    def __call__(
        self,
        process: Process,
        prediction: Float[Array, "b t h w c"],
        x0: Float[Array, "b t h w c"],
        noise: Float[Array, "b t h w c"],
        times: FrameTimes,
    ) -> Float[Array, "b"] | Float[Array, "b t"]:
        """Return the mean weighted error of every clip, or of every frame."""
        error = denoising_error(process, self.weigh, prediction, x0, noise, times.compact_t)
        return mean_over_frames(error, times)


# name -> a dataclass whose instances are terms of the loss.
LOSS_TERMS: dict[str, Callable[..., LossTerm]] = {"denoising": DenoisingLoss}


class BinnedValues(NamedTuple):
    """Values summed by interval of time; they add up over batches and hosts."""

    sums: Float[Array, "bins"]
    counts: Float[Array, "bins"]


def bin_by_time(values: Float[Array, "n"], t: Float[Array, "n"], bins: int) -> BinnedValues:
    """Sum values by the interval, each 1 / bins long, that their time is in."""
    index = jnp.clip(jnp.floor(t * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=jnp.float32)  # n bins
    return BinnedValues(
        sums=jnp.sum(member * values[:, None], axis=0),
        counts=jnp.sum(member, axis=0),
    )
