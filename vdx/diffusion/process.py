"""The forward process: how noise enters a video, and what a network may predict.

    x_t = alpha(t) x0 + sigma(t) noise,    t in [0, 1], 0 is data, 1 is noise.

Arrays are [b t h w c]. A time is a scalar, [b], or [b t] (one for each frame). Every prediction
is converted through the pair (x0, noise), so n kinds need n rules and not n * n:

    kind      prediction              x0 from it                        impossible where
    noise     noise                   (x_t - sigma noise) / alpha       alpha = 0
    x0        x0                      x0 (and noise divides by sigma)   sigma = 0
    v         alpha noise - sigma x0  (Salimans & Ho 2022)              nowhere
    velocity  noise - x0              (Lipman 2023, Liu 2023)           nowhere

Schedules map numpy to float64 numpy (timesteps, sampler coefficients) and jax to float32 jax
(training).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError, check_fields, lookup
from vdx.config.ranges import MAX_INT, Interval, OneOf
from vdx.types import Array

# The lower bound of every divisor: it keeps the two impossible corners finite. It is below the
# smallest alpha of any schedule here, except the exact zero of rectified flow.
FLOOR = 1e-5


def expand(t: Any, x: Array) -> Array:
    """Reshape t, [] or [b] or [b t], to float32 that broadcasts over x."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def shift_time(t: Any, s: float) -> Any:
    """Return s t / (1 + (s - 1) t): for s > 1, times closer to noise.

    Source: Esser et al. 2024, eq. 23.
    """
    return s * t / (1 + (s - 1) * t)


def _numpy_for(t: Any) -> tuple[Any, Any]:
    """Return (jnp, float32 t) for a jax array, else (np, float64 t)."""
    if isinstance(t, jax.Array):
        return jnp, t.astype(jnp.float32)
    return np, np.asarray(t, np.float64)


class Prediction:
    """One kind of prediction, converted from and to the pair (x0, noise)."""

    def encode(self, x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        """Return the prediction of a perfect network for this pair."""
        raise NotImplementedError

    def decode(
        self, prediction: Array, x_t: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        """Return the pair (x0, noise) that a prediction at x_t implies."""
        raise NotImplementedError

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        """Return |d (x_t, prediction) / d (x0, noise)|, by which `decode` divides."""
        raise NotImplementedError


class NoisePrediction(Prediction):
    """The noise itself (Ho et al. 2020)."""

    def encode(self, x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return noise

    def decode(
        self, prediction: Array, x_t: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        x0 = (x_t - sigma * prediction) / jnp.maximum(alpha, FLOOR)
        return x0, prediction

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        return alpha


class X0Prediction(Prediction):
    """The clean video itself."""

    def encode(self, x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return x0

    def decode(
        self, prediction: Array, x_t: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        noise = (x_t - alpha * prediction) / jnp.maximum(sigma, FLOOR)
        return prediction, noise

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        return sigma


class VPrediction(Prediction):
    """The v of Salimans & Ho 2022, for any alpha^2 + sigma^2 by a division."""

    def encode(self, x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return alpha * noise - sigma * x0

    def decode(
        self, prediction: Array, x_t: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        norm = self.determinant(alpha, sigma)
        x0 = (alpha * x_t - sigma * prediction) / norm
        noise = (sigma * x_t + alpha * prediction) / norm
        return x0, noise

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        return alpha**2 + sigma**2


class VelocityPrediction(Prediction):
    """The velocity noise - x0: d x_t / dt of the straight path."""

    def encode(self, x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        return noise - x0

    def decode(
        self, prediction: Array, x_t: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        norm = self.determinant(alpha, sigma)
        x0 = (x_t - sigma * prediction) / norm
        noise = (x_t + alpha * prediction) / norm
        return x0, noise

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        return alpha + sigma


PREDICTIONS: dict[str, Prediction] = {
    "noise": NoisePrediction(),
    "x0": X0Prediction(),
    "v": VPrediction(),
    "velocity": VelocityPrediction(),
}


PredictionName = Annotated[str, OneOf(lambda: PREDICTIONS)]
Open = Annotated[float, Interval(0, 1, low_open=True, high_open=True)]


class Process:
    """The base of the rows of PROCESSES.

    A row defines `alpha`, `sigma` and `network_time`.
    """

    prediction: str  # a row of PREDICTIONS: what the network predicts
    velocity_kind: ClassVar[str]  # the kind of prediction that losses.VelocityWeight targets

    def __post_init__(self) -> None:
        check_fields(self, "config.process")

    def alpha(self, t: Any) -> Any:
        """Return the scale of the signal, in the shape of t."""
        raise NotImplementedError

    def sigma(self, t: Any) -> Any:
        """Return the scale of the noise, in the shape of t."""
        raise NotImplementedError

    def network_time(self, t: Any) -> Any:
        """Return the network's time input for t, of the order of 1000."""
        raise NotImplementedError

    def nearest_time(self, t: np.ndarray) -> np.ndarray:
        """Return the nearest times that a sampler may visit."""
        raise NotImplementedError

    def log_snr(self, t: Any) -> Any:
        """Return log(alpha^2 / sigma^2), infinite where one is 0."""
        xp, t = _numpy_for(t)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log(self.alpha(t)) - xp.log(self.sigma(t)))

    def determinant(self, t: Any, kind: str | None = None) -> Any:
        """Return |d (x_t, prediction) / d (x0, noise)|, in the shape of t.

        At a fixed x_t, errors obey: x0 error = sigma / determinant * prediction error.
        """
        rule = lookup(kind or self.prediction, PREDICTIONS, "prediction")
        return rule.determinant(self.alpha(t), self.sigma(t))

    def add_noise(self, x0: Array, noise: Array, t: Any) -> Array:
        """Return x_t [b t h w c], float32."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def from_x0_noise(self, x0: Array, noise: Array, t: Any, kind: str | None = None) -> Array:
        """Return the training target, a perfect prediction: float32 like x0.

        kind: a row of PREDICTIONS, by default that of the process.
        """
        rule = lookup(kind or self.prediction, PREDICTIONS, "prediction")
        alpha = expand(self.alpha(t), x0)
        sigma = expand(self.sigma(t), x0)
        return rule.encode(x0.astype(jnp.float32), noise.astype(jnp.float32), alpha, sigma)

    def to_x0_noise(self, prediction: Array, x_t: Array, t: Any) -> tuple[Array, Array]:
        """Return the (x0, noise) that a prediction at x_t implies: float32 like x_t.

        They satisfy x_t = alpha x0 + sigma noise, except within FLOOR of an impossible corner.
        There the result is finite and the missing half is arbitrary.
        """
        rule = PREDICTIONS[self.prediction]
        alpha = expand(self.alpha(t), x_t)
        sigma = expand(self.sigma(t), x_t)
        return rule.decode(prediction.astype(jnp.float32), x_t.astype(jnp.float32), alpha, sigma)


def _cosine_betas(start: float, end: float, steps: int) -> np.ndarray:
    """Return the betas of Nichol & Dhariwal 2021, eq. 17, clipped at 0.999.

    `start` and `end` are unused: every row of BETAS has the same signature.
    """
    angle = (np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2
    alpha_bar = np.cos(angle) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": np.linspace,
    "scaled_linear": lambda start, end, steps: np.linspace(start**0.5, end**0.5, steps) ** 2,
    "cosine": _cosine_betas,
}


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Process):
    """The process with alpha^2 + sigma^2 = 1, from a table of discrete steps.

    Source: Ho et al. 2020. Step k of `steps` is t = (k + 1) / steps, and alpha^2 is 1 at t = 0. log
    alpha is linear in between. The network's time is k, as a float. Raises ConfigError for an
    unknown name, or for numbers that give no schedule.
    """

    betas: Annotated[str, OneOf(lambda: BETAS)] = "linear"  # a row of BETAS
    beta_start: Open = 1e-4  # noise variance of the first step, of Ho et al. 2020
    beta_end: Open = 0.02  # and of the last one
    steps: Annotated[int, Interval(2, MAX_INT)] = 1000  # discrete steps of the table
    prediction: PredictionName = "noise"  # a row of PREDICTIONS
    # Rescale the table so that t = 1 holds no signal (Lin et al. 2023, algorithm 1). A noise
    # prediction cannot start there.
    zero_terminal_snr: bool = False
    velocity_kind: ClassVar[str] = "v"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_start > self.beta_end:
            raise ConfigError(
                f"config.process.beta_start = {self.beta_start} is larger than beta_end = "
                f"{self.beta_end}: noise variances grow."
            )
        if self.zero_terminal_snr and self.prediction == "noise":
            raise ConfigError(
                "process: with zero_terminal_snr the noise does not determine x0 "
                "at t = 1; set prediction to v, x0 or velocity."
            )

    @functools.cached_property
    def _log_alpha_bar(self) -> np.ndarray:
        """Returns log alpha^2 at t = 0, 1/steps, ..., 1: float64 [steps + 1]."""
        betas = BETAS[self.betas](self.beta_start, self.beta_end, self.steps)
        table = np.cumsum(np.log1p(-betas))
        if self.zero_terminal_snr:
            root = np.exp(table / 2)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            # A positive last entry keeps the logarithm finite; its signal is negligible.
            table = 2 * np.log(np.maximum(root, 1e-6))
        return np.concatenate([[0.0], table])

    def _log_alpha_bar_at(self, t: Any) -> Any:
        """Interpolates the table at any t."""
        xp, t = _numpy_for(t)
        return xp.interp(t * self.steps, xp.arange(self.steps + 1), xp.asarray(self._log_alpha_bar))

    def alpha(self, t: Any) -> Any:
        xp, t = _numpy_for(t)
        return xp.exp(self._log_alpha_bar_at(t) / 2)

    def sigma(self, t: Any) -> Any:
        # expm1 keeps full precision where sigma is small.
        xp, t = _numpy_for(t)
        return xp.sqrt(-xp.expm1(self._log_alpha_bar_at(t)))

    def network_time(self, t: Any) -> Any:
        xp, t = _numpy_for(t)
        return xp.maximum(t * self.steps - 1, 0)

    def nearest_time(self, t: np.ndarray) -> np.ndarray:
        return np.round(np.asarray(t, np.float64) * self.steps) / self.steps


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Process):
    """The process of straight paths, alpha = 1 - t and sigma = t.

    The network's time is 1000 t. Raises ConfigError for an unknown prediction. Sources: Liu et
    al. 2023, Lipman et al. 2023.
    """

    prediction: PredictionName = "velocity"  # a row of PREDICTIONS
    velocity_kind: ClassVar[str] = "velocity"

    def alpha(self, t: Any) -> Any:
        return 1 - _numpy_for(t)[1]

    def sigma(self, t: Any) -> Any:
        return _numpy_for(t)[1]

    def network_time(self, t: Any) -> Any:
        return _numpy_for(t)[1] * 1000

    def nearest_time(self, t: np.ndarray) -> np.ndarray:
        # At t = 1 there is no signal, so the noise does not determine x0.
        last = 0.999 if self.prediction == "noise" else 1.0
        return np.minimum(np.asarray(t, np.float64), last)


PROCESSES = {"variance_preserving": VariancePreserving, "rectified_flow": RectifiedFlow}
