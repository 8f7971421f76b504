"""Timesteps: the times that a sampler visits, and the network's time at each of them.

n steps have n + 1 times, from (nearly) 1 down to 0. At all but the last a number of the order of
1000 is the network's time. Public codes differ in both, and a network samples best with the
timesteps of its makers:

    row               times before the shift, without the last          the network's time
    plain             n + 1 from 1 to 0                                 1000 t
    wan_unipc         n + 1 from 0.999 to 0                             1000 t without its fraction
    wan_dpmpp         n + 1 from 1 to 0                                 1000 t without its fraction
    diffusers_euler   n from 1 to shifted 0.001, all kept               1000 t
    diffusers_unipc   n + 1 from 1 to 0.001; the first is then 1 - 1e-6 1000 t without its fraction
    diffusers_dpmpp   n + 1 from 0.999 to 0                             1000 t without its fraction

wan_*: the code released with Wan 2.1 and 2.2. diffusers_* (0.42): its schedulers
FlowMatchEulerDiscrete with `shift`, and UniPCMultistep and DPMSolverMultistep with
`use_flow_sigmas` and `flow_shift`. A name says with which sampler its makers use it; any sampler
accepts any row.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError
from vdx.diffusion.process import Process, shift_time


def uniform_timesteps(process: Process, steps: int, shift: float = 1.0) -> np.ndarray:
    """Return uniform and then shifted times, float64 [steps + 1] from 1 to 0.

    They are rounded to the nearest times of the process. For a variance preserving one these are
    its discrete steps ("trailing" spacing, Lin et al. 2023). Raises ConfigError when fewer than
    `steps` different times remain.
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


@dataclasses.dataclass(frozen=True)
class Timesteps:
    """The times of a flow model's sampler, and the network's time at each.

    For `sample(denoise, RectifiedFlow(), sampler, x, timesteps.times)`, where `denoise(x, t)`
    evaluates the network at `timesteps.network_time(t)`.
    """

    times: np.ndarray  # float64 [n + 1], decreasing to 0
    network: np.ndarray  # float64 [n], the network's times

    def network_time(self, t: Any) -> Any:
        """Return the network's time at t, linear between the timesteps, in the shape of t.

        float32 jax for a jax array. Anything else gives float64 numpy, exact on the timesteps.
        """
        xp, dtype = (jnp, jnp.float32) if isinstance(t, jax.Array) else (np, np.float64)
        known = np.append(self.network, 0.0)
        return xp.interp(
            xp.asarray(t, dtype),
            xp.asarray(self.times[::-1], dtype),
            xp.asarray(known[::-1], dtype),
        )


def _plain(steps: int, shift: float) -> np.ndarray:
    return shift_time(np.linspace(1, 0, steps + 1)[:-1], shift)


def _wan_unipc(steps: int, shift: float) -> np.ndarray:
    # Its 0.999 is a float32, which matters where 1000 t is close to an integer.
    return shift_time(np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1], shift)


def _diffusers_euler(steps: int, shift: float) -> np.ndarray:
    last = shift_time(np.float32(0.001), shift)
    return shift_time(np.linspace(1000, 1000 * float(last), steps) / 1000, shift)


def _diffusers_unipc(steps: int, shift: float) -> np.ndarray:
    times = shift_time(np.linspace(1, 0.001, steps + 1)[:-1], shift)
    times[0] -= 1e-6
    return times


def _diffusers_dpmpp(steps: int, shift: float) -> np.ndarray:
    return shift_time(1 - np.linspace(1, 0.001, steps + 1), shift)[:0:-1]


def _timesteps(
    before_zero: Callable[[int, float], np.ndarray], whole: bool, steps: int, shift: float
) -> Timesteps:
    """Build one row: times before the final 0, and network times with or without fractions."""
    if steps < 1 or shift <= 0:
        raise ConfigError(f"timesteps: steps = {steps} and shift = {shift} must be positive.")
    times = before_zero(steps, shift)
    # All codes keep times in float32, which is a hundredth of alpha = 1e-6.
    kept = times.astype(np.float32)
    network = np.trunc(times * 1000) if whole else kept * np.float32(1000)
    return Timesteps(np.append(kept, 0).astype(np.float64), network.astype(np.float64))


# row(steps, shift) -> Timesteps. Raises ConfigError unless both are positive.
TIMESTEPS: dict[str, Callable[[int, float], Timesteps]] = {
    "plain": partial(_timesteps, _plain, False),
    "wan_unipc": partial(_timesteps, _wan_unipc, True),
    "wan_dpmpp": partial(_timesteps, _plain, True),
    "diffusers_euler": partial(_timesteps, _diffusers_euler, False),
    "diffusers_unipc": partial(_timesteps, _diffusers_unipc, True),
    "diffusers_dpmpp": partial(_timesteps, _diffusers_dpmpp, True),
}
