"""Samplers: from noise to video in one `lax.scan` over evaluations of the network.

A sampler turns times into a table of coefficients (`plan`, float64 numpy), one row for each
evaluation. From a row and the pair (x0, noise) it computes the next point (`step`). Samplers do
not depend on the network or on the kind of its prediction. With lambda = log(alpha / sigma), a
step from t down to s has h = lambda_s - lambda_t > 0. It is infinite from alpha = 0 or to
sigma = 0; the limits of all coefficients are finite.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import check_fields
from vdx.config.ranges import Fraction, Interval
from vdx.diffusion.process import FLOOR, Process
from vdx.diffusion.step_cache import StepCache, StepCacheState
from vdx.types import Array, Key

StepTable = dict[str, np.ndarray]  # name -> coefficients of all evaluations, [evaluations]
Row = Mapping[str, Any]  # name -> coefficient of one evaluation, traced
Carry = tuple[Array, ...]  # a sampler's state; its first array is x_t


@runtime_checkable
class Sampler(Protocol):
    """The interface of the rows of SAMPLERS."""

    @property
    def stochastic(self) -> bool:
        """True if steps draw fresh noise."""
        ...

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        """Return the coefficients of the evaluations that lead through `times`."""
        ...

    def start(self, x: Array) -> Carry:
        """Return the state at times[0]."""
        ...

    def step(self, carry: Carry, x0: Array, noise: Array, row: Row, fresh: Array | None) -> Carry:
        """Return the state after one evaluation, which gave the pair (x0, noise)."""
        ...


class Steps(NamedTuple):
    """The result of some consecutive evaluations."""

    carry: Carry  # the sampler's state after them
    evaluated: Array  # bool [evaluations b]: which of them evaluated the network for a clip


def sample(
    denoise: Callable[[Array, Array], Array],
    process: Process,
    sampler: Sampler,
    x: Array,
    times: np.ndarray,
    keys: Key[Array, "b"] | None = None,
) -> Array:
    """Return the video at times[-1] from `x` at times[0], float32 [b t h w c].

    denoise(x_t, t [b]) -> prediction of the process's kind. times: concrete floats [n + 1],
    decreasing, normally from 1 to 0. keys: [b], one a clip, needed by stochastic samplers; see
    `fresh_noise`. Raises ValueError for times that do not decrease within [0, 1], missing
    keys, or a start where the prediction does not determine x0.
    """
    table = step_table(process, sampler, times)
    start = sampler.start(x.astype(jnp.float32))
    return run_steps(denoise, process, sampler, start, table, keys).carry[0]


def step_table(process: Process, sampler: Sampler, times: np.ndarray) -> StepTable:
    """Return the sampler's plan over `times` with the `index` of each row.

    Raises ValueError as `sample` does.
    """
    plan = sampler.plan(process, _checked(process, times))
    table = {name: np.asarray(values, np.float32) for name, values in plan.items()}
    return table | {"index": np.arange(len(table["t"]), dtype=np.int32)}


def run_steps(
    denoise: Callable[[Array, Array], Array],
    process: Process,
    sampler: Sampler,
    carry: Carry,
    table: Mapping[str, np.ndarray | Array],  # a StepTable, or a part of one, traced
    keys: Key[Array, "b"] | None = None,  # [b], one a clip; only stochastic samplers need them
    step_cache: StepCache | None = None,
) -> Steps:
    """Run some consecutive rows of a step table.

    Several networks can take turns over one table. The carry starts as `sampler.start(x)`, and x is
    always its first array. Without `step_cache` every row evaluates the network.
    """
    if sampler.stochastic and keys is None:
        raise ValueError(f"{sampler} draws noise: pass a key for each clip.")
    if step_cache is None:
        required = jnp.ones(len(table["t"]), bool)
        cached = None
    else:
        required = step_cache.required(table["t"])
        cached = step_cache.start(carry[0])

    def evaluate(
        state: tuple[Carry, StepCacheState | None], now: tuple[Any, Array]
    ) -> tuple[tuple[Carry, StepCacheState | None], Array]:
        carry, cached = state
        row, required = now  # coefficients of this evaluation; whether it is required
        x = carry[0]
        t = jnp.broadcast_to(row["t"], x.shape[:1])

        if step_cache is None or cached is None:
            prediction = denoise(x, t)
            evaluated = jnp.broadcast_to(required, len(x))
        else:
            prediction, cached, evaluated = step_cache(denoise, x, t, required, cached)

        x0, noise = process.to_x0_noise(prediction, x, t)
        fresh = None
        if sampler.stochastic and keys is not None:
            fresh = fresh_noise(keys, row["index"], x.shape[1:])
        return (sampler.step(carry, x0, noise, row, fresh), cached), evaluated

    (carry, _), evaluated = jax.lax.scan(evaluate, (carry, cached), (table, required))
    return Steps(carry, evaluated)


def fresh_noise(keys: Key[Array, "b"], index: Array, shape: tuple[int, ...]) -> Array:
    """Return the noise [b ...] that evaluation `index` [] draws for clips of `shape`.

    Clip i draws from fold_in(keys[i], index), so that it is the same in any batch.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), shape))(keys)


def clamp_known_frames(
    denoise: Callable[[Array, Array], Array], known: Array, is_generated: Array
) -> Callable[[Array, Array], Array]:
    """Return a `denoise` whose network sees given frames as they are, at time 0.

    known: the given frames, [b t h w c]. is_generated: [b t], 0 for given frames and 1 for the
    others. Source: Wan 2.2 TI2V, whose first frame is given.
    """

    def clamped(x: Array, t: Array) -> Array:
        x = jnp.where(is_generated[..., None, None, None] > 0, x, known)
        return denoise(x, t[:, None] * is_generated)

    return clamped


def _checked(process: Process, times: np.ndarray) -> np.ndarray:
    """Return times as float64. Raises ValueError for times that no sampler can visit."""
    times = np.asarray(times, np.float64)
    decreasing = times.ndim == 1 and len(times) > 1 and not np.any(np.diff(times) >= 0)
    if not decreasing or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must be [n + 1], decreasing within [0, 1], not {times}.")
    if process.prediction == "noise" and process.alpha(times[0]) < FLOOR:
        raise ValueError(
            f"times start at {times[0]}, where x_t is noise alone and a noise prediction does "
            "not determine x0; take the times from uniform_timesteps."
        )
    return times


def _log_ratio(process: Process, times: np.ndarray) -> np.ndarray:
    """Return lambda = log(alpha / sigma)."""
    return process.log_snr(times) / 2


@dataclasses.dataclass(frozen=True)
class DDIM:
    """DDIM: x0 and noise recombined at s, with some fresh noise.

    Source: Song et al. 2021, eq. 12.

    x_s = alpha_s x0 + (rest of sigma_s) noise + part fresh noise. The posterior's standard
    deviation is sigma_s sqrt(1 - exp(-2 h)) for any alpha and sigma.
    """

    eta: Fraction = 0.0  # share of fresh noise in the posterior's deviation; 0: Euler's method

    def __post_init__(self) -> None:
        check_fields(self, "sampler")

    @property
    def stochastic(self) -> bool:
        """True if steps draw fresh noise."""
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

    def step(self, carry: Carry, x0: Array, noise: Array, row: Row, fresh: Array | None) -> Carry:
        x = row["x0"] * x0 + row["noise"] * noise
        if fresh is not None:
            x = x + row["fresh"] * fresh
        return (x,)


@dataclasses.dataclass(frozen=True)
class DDPM(DDIM):
    """Ancestral sampling with the posterior's variance: DDIM with eta 1.

    Source: Ho et al. 2020.

    The posterior of any Gaussian process has the same form, so this covers rectified flow too.
    """

    eta: float = dataclasses.field(default=1.0, init=False)


@dataclasses.dataclass(frozen=True)
class Euler(DDIM):
    """Euler's method for the probability flow ODE: DDIM with eta 0.

    For rectified flow it is x + (s - t) velocity; for a variance preserving process the Euler
    step of x / alpha in sigma / alpha (Karras et al. 2022).
    """

    eta: float = dataclasses.field(default=0.0, init=False)


@dataclasses.dataclass(frozen=True)
class Heun:
    """Heun's method: two evaluations a step, one in the last step.

    Source: Karras et al. 2022.

    It integrates y = x / (alpha + sigma) in u = sigma / (alpha + sigma), where dy/du =
    noise - x0. That is finite at both ends of every process, and the velocity itself for
    rectified flow. The 2n - 1 rows evaluate at t0, t1, t1, t2, t2, ...
    """

    stochastic: ClassVar[bool] = False

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        scale = process.alpha(times) + process.sigma(times)
        u = process.sigma(times) / scale

        def twice(a: np.ndarray) -> np.ndarray:
            return np.repeat(a, 2)

        return {
            "t": twice(times[:-1])[1:],
            "scale_in": twice(scale[:-1])[1:],
            "scale_out": twice(scale[1:])[:-1],
            "du": twice(np.diff(u))[:-1],
            "first": np.arange(2 * len(times) - 3) % 2 == 0,
        }

    def start(self, x: Array) -> Carry:
        return x, jnp.zeros_like(x), jnp.zeros_like(x)

    def step(self, carry: Carry, x0: Array, noise: Array, row: Row, fresh: Array | None) -> Carry:
        x, y, slope = carry
        here = noise - x0
        first = row["first"] > 0
        y = jnp.where(first, x / row["scale_in"], y)
        slope = jnp.where(first, here, (slope + here) / 2)
        return row["scale_out"] * (y + row["du"] * slope), y, slope


def _exponential(process: Process, times: np.ndarray) -> StepTable:
    """Return the table of x_s = keep x + gain (x0 + trend (x0 - previous x0)).

    `keep` and `gain` are exact for an x0 that is constant in lambda; `trend` makes it second
    order.
    """
    alpha = process.alpha(times)
    sigma = process.sigma(times)
    h = np.diff(_log_ratio(process, times))

    trend = np.zeros_like(h)
    # The first step has no trend yet, and a step to lambda = inf cannot be extrapolated.
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
    """DPM-Solver++(2M) in the midpoint form (Lu et al. 2022, algorithm 2)."""

    stochastic: ClassVar[bool] = False

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        rows = _exponential(process, times)
        del rows["h"]
        return rows

    def start(self, x: Array) -> Carry:
        return x, jnp.zeros_like(x)

    def step(self, carry: Carry, x0: Array, noise: Array, row: Row, fresh: Array | None) -> Carry:
        x, before = carry
        x = row["keep"] * x + row["gain"] * (x0 + row["trend"] * (x0 - before))
        return x, x0


@dataclasses.dataclass(frozen=True)
class UniPC:
    """UniPC with B2(h) on x0 (Zhao et al. 2023): DPM-Solver++(2M) with a corrector.

    The corrector costs no evaluation: each x0 first corrects the step that led to it, then
    predicts the next one. Raises ConfigError for an order other than 1 and 2.
    """

    order: Annotated[int, Interval(1, 2)] = 2  # of the predictor and the corrector
    corrector: bool = True  # whether steps are corrected
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, "sampler")

    def plan(self, process: Process, times: np.ndarray) -> StepTable:
        rows = _exponential(process, times)
        h = rows.pop("h")
        if self.order == 1:
            rows["trend"] = np.zeros_like(h)
        old = np.zeros_like(h)
        new = np.full_like(h, 0.5)
        if self.order == 2:
            old[1:-1], new[1:-1] = _correction(h[1:-1], h[:-2])

        # Evaluation i corrects step i - 1; there is none before the first.
        def late(a: np.ndarray) -> np.ndarray:
            return np.concatenate([[0.0], a[:-1]])

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

    def step(self, carry: Carry, x0: Array, noise: Array, row: Row, fresh: Array | None) -> Carry:
        x, last_x, last, before = carry
        mean = last + row["old"] * (before - last) + row["new"] * (x0 - last)
        corrected = row["last_keep"] * last_x + row["last_gain"] * mean
        x = jnp.where(row["correct"] > 0, corrected, x)
        predicted = row["keep"] * x + row["gain"] * (x0 + row["trend"] * (x0 - last))
        return predicted, x, x0, last


def _correction(h: np.ndarray, h_before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of (before last - last) and (new - last) in a correction.

    They match the exponential integral of 1 and of lambda; h is finite, h_before may not be.
    """
    r = -h_before / h
    inverse = 1 / -np.expm1(-h)
    first = inverse - 1 / h
    second = inverse - 2 * first / h
    rho = (second - first) / (r - 1)
    return rho / r, first - rho


SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMSolverPP2M,
    "unipc": UniPC,
}
