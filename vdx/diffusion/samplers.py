"""Samplers: from noise to video in one `lax.scan` over evaluations of the network.

A sampler turns a grid of times into rows of coefficients (`plan`, float64 numpy), one row for
each evaluation, and a row and the pair (x0, noise) into the next point (`step`). Neither knows
the network nor what it predicts. With lambda = log(alpha / sigma), a step from t down to s has
h = lambda_s - lambda_t > 0, which is infinite from alpha = 0 or to sigma = 0; the limits of all
coefficients are finite.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError
from vdx.diffusion.process import FLOOR, Process, shift_time
from vdx.diffusion.step_cache import StepCache, StepCacheState
from vdx.types import Array, PRNGKeyArray

StepTable = dict[str, np.ndarray]
Carry = tuple[Array, ...]


def uniform_timesteps(process: Process, steps: int, shift: float = 1.0) -> np.ndarray:
    """Times for `sample`: float64 [steps + 1] from 1 to 0, uniform and then shifted.

    Moved to the nearest times that the process has: for a variance preserving one these are
    its discrete steps ("trailing" spacing, Lin et al. 2023). Raises ConfigError when fewer
    than `steps` different times are left.
    """
    if steps < 1 or shift <= 0:
        raise ConfigError(f"sampler: steps = {steps} and shift = {shift} must be positive.")
    times = process.nearest_time(shift_time(np.linspace(1.0, 0.0, steps + 1), shift))
    if np.any(np.diff(times) >= 0):
        raise ConfigError(
            f"sampler: {steps} steps with shift {shift} are finer than the times "
            f"of {process}; use fewer steps."
        )
    return times


def sample(
    denoise: Callable[[Array, Array], Array],
    process: Process,
    sampler: Any,
    x: Array,
    times: np.ndarray,
    key: PRNGKeyArray | None = None,
) -> Array:
    """The video at times[-1], float32 [b t h w c], from `x` at times[0].

    denoise(x_t, t [b]) -> prediction of the kind that the process says. `times` is a concrete
    float [n + 1], decreasing, normally from 1 to 0. `key` is needed by stochastic samplers;
    evaluation i draws from fold_in(key, i). Raises ValueError for times that do not decrease
    within [0, 1], a missing key, or a start where the prediction cannot say x0.
    """
    rows = step_table(process, sampler, times)
    return run_steps(denoise, process, sampler, sampler.start(x.astype(jnp.float32)), rows, key)[0][
        0
    ]


def step_table(process: Process, sampler: Any, times: np.ndarray) -> StepTable:
    """The sampler's plan over `times`, float32, and `index`, the number of each evaluation.

    Raises ValueError as `sample` does.
    """
    plan = sampler.plan(process, _checked(process, times))
    rows = {name: np.asarray(values, np.float32) for name, values in plan.items()}
    return rows | {"index": np.arange(len(rows["t"]), dtype=np.int32)}


def run_steps(
    denoise: Callable[[Array, Array], Array],
    process: Process,
    sampler: Any,
    carry: Carry,
    rows: StepTable,
    key: PRNGKeyArray | None = None,
    reuse: StepCache | None = None,
) -> tuple[Carry, Array]:
    """(`carry` after some consecutive `rows` of `evaluations`, bool [rows]: which of them asked
    `denoise`), so that several networks can take turns.

    The carry begins as `sampler.start(x)`, and x is always its first array. Without `reuse` all
    evaluations are made.
    """
    if sampler.stochastic and key is None:
        raise ValueError(f"{sampler} draws noise: pass a key.")
    must = np.ones(len(rows["t"]), bool) if reuse is None else reuse.must(rows["t"])
    memory = None if reuse is None else reuse.start(carry[0])

    def evaluate(state, now) -> tuple[tuple[Carry, StepCacheState | None], Array]:
        (carry, memory), (row, asked) = state, now
        x = carry[0]
        t = jnp.broadcast_to(row["t"], x.shape[:1])
        if reuse is None:
            prediction = denoise(x, t)
        else:
            prediction, memory, asked = reuse(denoise, x, t, asked, memory)
        x0, noise = process.to_x0_noise(prediction, x, t)
        fresh = None
        if sampler.stochastic and key is not None:
            fresh = jax.random.normal(jax.random.fold_in(key, row["index"]), x.shape)
        return (sampler.step(carry, x0, noise, row, fresh), memory), asked

    (carry, _), asked = jax.lax.scan(evaluate, (carry, memory), (rows, must))
    return carry, asked


def clamp_known_frames(
    denoise: Callable[[Array, Array], Array], known: Array, is_generated: Array
) -> Callable[[Array, Array], Array]:
    """A `denoise` whose network sees some frames as `known` [b t h w c], at time 0: those where
    `free` [b t] is 0, elsewhere 1 (Wan 2.2 TI2V, whose first frame is given)."""

    def held(x: Array, t: Array) -> Array:
        return denoise(
            jnp.where(is_generated[..., None, None, None] > 0, x, known), t[:, None] * is_generated
        )

    return held


def _checked(process: Process, times) -> np.ndarray:
    times = np.asarray(times, np.float64)
    if (
        times.ndim != 1
        or len(times) < 2
        or np.any(np.diff(times) >= 0)
        or (times[0] > 1 or times[-1] < 0)
    ):
        raise ValueError(f"times must be [n + 1], decreasing within [0, 1], not {times}.")
    if process.prediction == "noise" and process.alpha(times[0]) < FLOOR:
        raise ValueError(
            f"times start at {times[0]}, where x_t is noise alone and a noise "
            "prediction does not say x0; take the times from time_grid."
        )
    return times


def _log_ratio(process: Process, times: np.ndarray) -> np.ndarray:
    return process.log_snr(times) / 2


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, eq. 12: x_s = alpha_s x0 + (rest of sigma_s) noise + part fresh noise.

    `eta` in [0, 1] is the fresh part of the posterior's standard deviation, which for any
    alpha and sigma is sigma_s sqrt(1 - exp(-2 h)). With eta 0 it is Euler's method.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"sampler.eta = {self.eta} must be in [0, 1].")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        h = np.diff(_log_ratio(process, times))
        sigma = process.sigma(times[1:])
        fresh = self.eta * sigma * np.sqrt(-np.expm1(-2 * h))
        return {
            "t": times[:-1],
            "x0": process.alpha(times[1:]),
            "noise": np.sqrt(np.maximum(sigma**2 - fresh**2, 0)),
            "fresh": fresh,
        }

    def start(self, x: Array) -> Carry:
        return (x,)

    def step(self, carry: Carry, x0: Array, noise: Array, row, fresh) -> Carry:
        x = row["x0"] * x0 + row["noise"] * noise
        return (x if fresh is None else x + row["fresh"] * fresh,)


@dataclasses.dataclass(frozen=True)
class DDPM(DDIM):
    """Ancestral sampling with the posterior's variance (Ho et al. 2020), which is DDIM, eta 1.

    The posterior of any Gaussian process has the same form, so it serves rectified flow too.
    """

    eta: float = dataclasses.field(default=1.0, init=False)


@dataclasses.dataclass(frozen=True)
class Euler(DDIM):
    """Euler's method for the probability flow ODE, which is DDIM, eta 0.

    For rectified flow it is x + (s - t) velocity; for a variance preserving process the Euler
    step of x / alpha in sigma / alpha (Karras et al. 2022).
    """

    eta: float = dataclasses.field(default=0.0, init=False)


@dataclasses.dataclass(frozen=True)
class Heun:
    """The trapezoidal rule, two evaluations a step, one in the last (Karras et al. 2022).

    It integrates y = x / (alpha + sigma) in u = sigma / (alpha + sigma), where dy/du =
    noise - x0: finite at both ends of every process, and the velocity itself for rectified
    flow. The 2n - 1 rows evaluate at t0, t1, t1, t2, t2, ...
    """

    stochastic: ClassVar[bool] = False

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        scale = process.alpha(times) + process.sigma(times)
        u = process.sigma(times) / scale
        twice = lambda a: np.repeat(a, 2)
        return {
            "t": twice(times[:-1])[1:],
            "scale_in": twice(scale[:-1])[1:],
            "scale_out": twice(scale[1:])[:-1],
            "du": twice(np.diff(u))[:-1],
            "first": np.arange(2 * len(times) - 3) % 2 == 0,
        }

    def start(self, x: Array) -> Carry:
        return x, jnp.zeros_like(x), jnp.zeros_like(x)

    def step(self, carry: Carry, x0: Array, noise: Array, row, fresh) -> Carry:
        x, y, slope = carry
        here = noise - x0
        first = row["first"] > 0
        y = jnp.where(first, x / row["scale_in"], y)
        slope = jnp.where(first, here, (slope + here) / 2)
        return row["scale_out"] * (y + row["du"] * slope), y, slope


def _exponential(process: Process, times: np.ndarray) -> StepTable:
    """Rows of x_s = keep x + gain (x0 + trend (x0 - previous x0)); keep and gain are exact for
    an x0 that stays constant in lambda, the trend makes it second order."""
    alpha, sigma, ratio = process.alpha(times), process.sigma(times), _log_ratio(process, times)
    h = np.diff(ratio)
    trend = np.zeros_like(h)
    # The first step knows no trend, and one to lambda = inf cannot be extrapolated.
    known = np.isfinite(h[1:])
    trend[1:][known] = h[1:][known] / (2 * h[:-1][known])
    return {
        "t": times[:-1],
        "keep": sigma[1:] / sigma[:-1],
        "gain": alpha[1:] * -np.expm1(-h),
        "trend": trend,
        "h": h,
    }


@dataclasses.dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M), the midpoint form (Lu et al. 2022, algorithm 2)."""

    stochastic: ClassVar[bool] = False

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        rows = _exponential(process, times)
        del rows["h"]
        return rows

    def start(self, x: Array) -> Carry:
        return x, jnp.zeros_like(x)

    def step(self, carry: Carry, x0: Array, noise: Array, row, fresh) -> Carry:
        x, before = carry
        return row["keep"] * x + row["gain"] * (x0 + row["trend"] * (x0 - before)), x0


@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC with B2(h) on x0 (Zhao et al. 2023): DPM-Solver++(2M) and, for free, a corrector.

    Each x0 serves twice: it corrects the step that led to it, then predicts the next one.
    `order` is 1 or 2. Raises ConfigError for another order.
    """

    order: int = 2
    corrector: bool = True
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ConfigError(f"sampler.order = {self.order} must be 1 or 2.")

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        rows = _exponential(process, times)
        h = rows.pop("h")
        if self.order == 1:
            rows["trend"] = np.zeros_like(h)
        old, new = np.zeros_like(h), np.full_like(h, 0.5)
        if self.order == 2:
            old[1:-1], new[1:-1] = _correction(h[1:-1], h[:-2])
        # Evaluation i corrects step i - 1; there is none before the first.
        late = lambda a: np.concatenate([[0.0], a[:-1]])
        correct = (np.arange(len(h)) > 0) & self.corrector
        return rows | {
            "last_keep": late(rows["keep"]),
            "last_gain": late(rows["gain"]),
            "old": late(old),
            "new": late(new),
            "correct": correct,
        }

    def start(self, x: Array) -> Carry:
        return x, x, jnp.zeros_like(x), jnp.zeros_like(x)

    def step(self, carry: Carry, x0: Array, noise: Array, row, fresh) -> Carry:
        x, last_x, last, before = carry
        mean = last + row["old"] * (before - last) + row["new"] * (x0 - last)
        corrected = row["last_keep"] * last_x + row["last_gain"] * mean
        x = jnp.where(row["correct"] > 0, corrected, x)
        ahead = row["keep"] * x + row["gain"] * (x0 + row["trend"] * (x0 - last))
        return ahead, x, x0, last


def _correction(h: np.ndarray, h_before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of (x0 before last - last) and (new - last) in a corrected step of second order.

    They match the exponential integral of 1 and of lambda; h is finite, h_before may not be.
    """
    r = -h_before / h
    inverse = 1 / -np.expm1(-h)
    first = inverse - 1 / h
    second = inverse - 2 * first / h
    rho = (second - first) / (r - 1)
    return rho / r, first - rho


SAMPLERS = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMSolverPP2M,
    "unipc": UniPC,
}
