"""The forward process: how noise enters a video, and how training draws its times.

    x_t = alpha(t) x0 + sigma(t) noise,    t in [0, 1], 0 is data, 1 is noise.

Arrays are [b t h w c]; a time is a scalar, [b], or [b t] (one for each frame). What a network
predicts is always converted through the pair (x0, noise), so n kinds need n rules, not n * n:

    kind      prediction              x0 from it                        impossible where
    noise     noise                   (x_t - sigma noise) / alpha       alpha = 0
    x0        x0                      x0 (and noise divides by sigma)   sigma = 0
    v         alpha noise - sigma x0  (Salimans & Ho 2022)              nowhere
    velocity  noise - x0              (Lipman 2023, Liu 2023)           nowhere

Schedules take numpy in and give float64 numpy (grids, sampler coefficients), or jax in and
give float32 jax (training).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError, lookup
from vdx.types import Array, PRNGKeyArray

# Divisors are kept above this, so that the two impossible corners stay finite. It is below
# the smallest alpha of any schedule here except the exact zero of rectified flow.
FLOOR = 1e-5


def expand(t: Any, x: Array) -> Array:
    """`t` in float32 with its axes on the leading axes of `x`: [], [b] or [b t]."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def shift_time(t: Any, s: float) -> Any:
    """s t / (1 + (s - 1) t): more time at high noise for s > 1 (Esser et al. 2024, eq. 23)."""
    return s * t / (1 + (s - 1) * t)


def _numpy_for(t: Any) -> tuple[Any, Any]:
    """(jnp, t in float32) for a jax array, (np, t in float64) for anything else."""
    if isinstance(t, jax.Array):
        return jnp, t.astype(jnp.float32)
    return np, np.asarray(t, np.float64)


class Prediction:
    """One kind of prediction: its value for a pair (x0, noise), and the pair for its value."""

    def encode(self, x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
        raise NotImplementedError

    def decode(
        self, prediction: Array, x_t: Array, alpha: Array, sigma: Array
    ) -> tuple[Array, Array]:
        raise NotImplementedError

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        """|d (x_t, prediction) / d (x0, noise)|, what `decode` divides by."""
        raise NotImplementedError


class NoisePrediction(Prediction):
    """The noise (Ho et al. 2020)."""

    def encode(self, x0, noise, alpha, sigma):
        return noise

    def decode(self, prediction, x_t, alpha, sigma):
        return (x_t - sigma * prediction) / jnp.maximum(alpha, FLOOR), prediction

    def determinant(self, alpha, sigma):
        return alpha


class X0Prediction(Prediction):
    """The clean video itself."""

    def encode(self, x0, noise, alpha, sigma):
        return x0

    def decode(self, prediction, x_t, alpha, sigma):
        return prediction, (x_t - alpha * prediction) / jnp.maximum(sigma, FLOOR)

    def determinant(self, alpha, sigma):
        return sigma


class VPrediction(Prediction):
    """Salimans & Ho 2022; the division extends it to alpha^2 + sigma^2 other than 1."""

    def encode(self, x0, noise, alpha, sigma):
        return alpha * noise - sigma * x0

    def decode(self, prediction, x_t, alpha, sigma):
        norm = self.determinant(alpha, sigma)
        return (
            (alpha * x_t - sigma * prediction) / norm,
            (sigma * x_t + alpha * prediction) / norm,
        )

    def determinant(self, alpha, sigma):
        return alpha**2 + sigma**2


class VelocityPrediction(Prediction):
    """noise - x0, which is d x_t / dt of the straight path; defined for any alpha, sigma."""

    def encode(self, x0, noise, alpha, sigma):
        return noise - x0

    def decode(self, prediction, x_t, alpha, sigma):
        norm = self.determinant(alpha, sigma)
        return (x_t - sigma * prediction) / norm, (x_t + alpha * prediction) / norm

    def determinant(self, alpha, sigma):
        return alpha + sigma


PREDICTIONS: dict[str, Prediction] = {
    "noise": NoisePrediction(),
    "x0": X0Prediction(),
    "v": VPrediction(),
    "velocity": VelocityPrediction(),
}


class Process:
    """What every process offers; a row of PROCESSES says `alpha`, `sigma`, `network_time`."""

    prediction: str
    velocity_kind: ClassVar[str]  # the kind that losses.VelocityWeight stands for

    def __post_init__(self) -> None:
        lookup(self.prediction, PREDICTIONS, "process.prediction")

    def alpha(self, t: Any) -> Any:
        """Signal scale, the shape of t."""
        raise NotImplementedError

    def sigma(self, t: Any) -> Any:
        """Noise scale, the shape of t."""
        raise NotImplementedError

    def network_time(self, t: Any) -> Any:
        """The number that the network is fed for t, of the order of 1000."""
        raise NotImplementedError

    def nearest_time(self, t: np.ndarray) -> np.ndarray:
        """The nearest times that a sampler should visit with this process and prediction."""
        raise NotImplementedError

    def log_snr(self, t: Any) -> Any:
        """log(alpha^2 / sigma^2), the shape of t; infinite where one of them is 0."""
        xp, t = _numpy_for(t)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log(self.alpha(t)) - xp.log(self.sigma(t)))

    def determinant(self, t: Any, kind: str | None = None) -> Any:
        """|d (x_t, prediction) / d (x0, noise)|, the shape of t.

        At a fixed x_t, errors obey: x0 error = sigma / determinant * prediction error.
        """
        rule = lookup(kind or self.prediction, PREDICTIONS, "prediction")
        return rule.determinant(self.alpha(t), self.sigma(t))

    def add_noise(self, x0: Array, noise: Array, t: Any) -> Array:
        """x_t [b t h w c], float32."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def from_x0_noise(self, x0: Array, noise: Array, t: Any, kind: str | None = None) -> Array:
        """The prediction that a perfect network makes, which is the training target.

        `kind` is a row of PREDICTIONS, by default that of the process. Shape of x0, float32.
        """
        rule = lookup(kind or self.prediction, PREDICTIONS, "prediction")
        alpha, sigma = expand(self.alpha(t), x0), expand(self.sigma(t), x0)
        x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
        return rule.encode(x0, noise, alpha, sigma)

    def to_x0_noise(self, prediction: Array, x_t: Array, t: Any) -> tuple[Array, Array]:
        """(x0, noise) that a prediction at x_t means; shapes of x_t, float32.

        They satisfy x_t = alpha x0 + sigma noise, except within FLOOR of an impossible
        corner, where the result is finite but says nothing about the missing half.
        """
        alpha, sigma = expand(self.alpha(t), x_t), expand(self.sigma(t), x_t)
        prediction, x_t = prediction.astype(jnp.float32), x_t.astype(jnp.float32)
        return PREDICTIONS[self.prediction].decode(prediction, x_t, alpha, sigma)


def _cosine_betas(start: float, end: float, steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17, betas clipped at 0.999; start and end are unused."""
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
    """alpha^2 + sigma^2 = 1 (Ho et al. 2020), from a table of discrete steps.

    Step k of `steps` is t = (k + 1) / steps and alpha^2 is 1 at t = 0; log alpha is linear in
    between. The network is fed k as a float. `zero_terminal_snr` rescales the table so that
    t = 1 holds no signal (Lin et al. 2023, algorithm 1); a noise prediction cannot start there.
    Raises ConfigError for an unknown name or numbers that give no schedule.
    """

    betas: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    prediction: str = "noise"
    zero_terminal_snr: bool = False
    velocity_kind: ClassVar[str] = "v"

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup(self.betas, BETAS, "process.betas")
        if self.steps < 2 or not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"process: steps = {self.steps}, beta_start = {self.beta_start}, beta_end = "
                f"{self.beta_end}; expected steps >= 2 and 0 < beta_start <= beta_end < 1."
            )
        if self.zero_terminal_snr and self.prediction == "noise":
            raise ConfigError(
                "process: with zero_terminal_snr the noise does not determine x0 "
                "at t = 1; set prediction to v, x0 or velocity."
            )

    @functools.cached_property
    def _log_alpha_bar(self) -> np.ndarray:
        """log alpha^2 at t = 0, 1/steps, ..., 1; float64 [steps + 1]."""
        betas = BETAS[self.betas](self.beta_start, self.beta_end, self.steps)
        table = np.cumsum(np.log1p(-betas))
        if self.zero_terminal_snr:
            root = np.exp(table / 2)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            # A positive last entry keeps the logarithm finite; as signal it is nothing.
            table = 2 * np.log(np.maximum(root, 1e-6))
        return np.concatenate([[0.0], table])

    def _log_alpha_bar_at(self, t: Any) -> Any:
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
    """Straight paths: alpha = 1 - t, sigma = t (Liu et al. 2023, Lipman et al. 2023).

    The network is fed 1000 t. Raises ConfigError for an unknown prediction.
    """

    prediction: str = "velocity"
    velocity_kind: ClassVar[str] = "velocity"

    def alpha(self, t: Any) -> Any:
        return 1 - _numpy_for(t)[1]

    def sigma(self, t: Any) -> Any:
        return _numpy_for(t)[1]

    def network_time(self, t: Any) -> Any:
        return _numpy_for(t)[1] * 1000

    def nearest_time(self, t: np.ndarray) -> np.ndarray:
        # At t = 1 there is no signal, so the noise says nothing about x0.
        last = 0.999 if self.prediction == "noise" else 1.0
        return np.minimum(np.asarray(t, np.float64), last)


PROCESSES = {"variance_preserving": VariancePreserving, "rectified_flow": RectifiedFlow}


def _stratified(key: PRNGKeyArray, batch: int) -> Array:
    """float32 [batch], each uniform in (0, 1), one in each 1/batch (Kingma et al. 2021, VDM)."""
    offset_key, order_key = jax.random.split(key)
    offset = jax.random.uniform(offset_key, ())
    u = (offset + jnp.arange(batch) / batch) % 1.0
    # The order is random, or rows of a batch (devices) would see only their own noise level.
    return jnp.clip(jax.random.permutation(order_key, u), 1e-6, 1 - 1e-6)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Training times uniform in [0, 1], then shifted.

    `shift` and, when `base_tokens` is set, sqrt(tokens / base_tokens) multiply to the s of
    `shift_time`: a larger video needs more noise to hide the same content (Esser et al. 2024).
    Raises ConfigError for a shift or base_tokens that is not positive.
    """

    shift: float = 1.0
    base_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.shift <= 0 or (self.base_tokens is not None and self.base_tokens <= 0):
            raise ConfigError(
                f"times: shift = {self.shift}, base_tokens = {self.base_tokens}; "
                "both must be positive."
            )

    def shift_for(self, num_tokens: int) -> float:
        """The s of `shift_time` for a video of that many tokens."""
        ratio = num_tokens / self.base_tokens if self.base_tokens else 1.0
        return self.shift * math.sqrt(ratio)

    def quantile(self, u: Array) -> Array:
        """Inverse cumulative distribution, before the shift."""
        return u

    def sample(self, key: PRNGKeyArray, batch: int, num_tokens: int) -> Array:
        """Times float32 [batch], stratified over the batch so that gradients vary less."""
        return shift_time(self.quantile(_stratified(key, batch)), self.shift_for(num_tokens))


@dataclasses.dataclass(frozen=True)
class LogitNormal(Uniform):
    """logit(t) ~ N(mean, std^2), then shifted (Esser et al. 2024, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, u: Array) -> Array:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))


TIME_SAMPLERS = {"uniform": Uniform, "logit_normal": LogitNormal}
