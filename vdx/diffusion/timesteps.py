"""Time grids of public flow models: where their samplers stop, and what the network is told.

A grid of n steps has n + 1 times for `samplers.sample`, from (nearly) 1 down to 0, and for all
but the last the number that the network is fed there, of the order of 1000. Codes differ in
both, and a network is best asked as those who released it ask it:

    row               times before the shift, the last one left out    the network is fed
    plain             n + 1 from 1 to 0                                 1000 t
    wan_unipc         n + 1 from 0.999 to 0                             1000 t without its fraction
    wan_dpmpp         n + 1 from 1 to 0                                 1000 t without its fraction
    diffusers_euler   n from 1 to shifted 0.001, all kept               1000 t
    diffusers_unipc   n + 1 from 1 to 0.001; the first is then 1 - 1e-6 1000 t without its fraction
    diffusers_dpmpp   n + 1 from 0.999 to 0                             1000 t without its fraction

wan_*: the code released with Wan 2.1 and 2.2. diffusers_* (0.42): its schedulers
FlowMatchEulerDiscrete with `shift`, and UniPCMultistep and DPMSolverMultistep with
`use_flow_sigmas` and `flow_shift`. A name says which sampler the grid comes with; any runs on it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdx.config.build import ConfigError
from vdx.diffusion.process import shift_time


@dataclasses.dataclass(frozen=True)
class Timesteps:
    """times: float64 [n + 1], decreasing to 0. network: float64 [n], the network's times.

    For `sample(denoise, RectifiedFlow(), sampler, x, grid.times)`, whose `denoise(x, t)` asks its
    network at `grid.network_time(t)`.
    """

    times: np.ndarray
    network: np.ndarray

    def network_time(self, t: Any) -> Any:
        """`network` at the times of the grid, linear in between; the shape of t. float32 jax for
        a jax array, for anything else float64 numpy, which is exact on the grid."""
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


def _grid(
    before_zero: Callable[[int, float], np.ndarray], whole: bool, steps: int, shift: float
) -> Timesteps:
    if steps < 1 or shift <= 0:
        raise ConfigError(f"grid: steps = {steps} and shift = {shift} must be positive.")
    times = before_zero(steps, shift)
    # All codes keep times in float32, which is a hundredth of alpha = 1e-6.
    kept = times.astype(np.float32)
    network = np.trunc(times * 1000) if whole else kept * np.float32(1000)
    return Timesteps(np.append(kept, 0).astype(np.float64), network.astype(np.float64))


# row(steps, shift) -> Grid. Raises ConfigError unless both are positive.
TIMESTEPS: dict[str, Callable[[int, float], Timesteps]] = {
    "plain": partial(_grid, _plain, False),
    "wan_unipc": partial(_grid, _wan_unipc, True),
    "wan_dpmpp": partial(_grid, _plain, True),
    "diffusers_euler": partial(_grid, _diffusers_euler, False),
    "diffusers_unipc": partial(_grid, _diffusers_unipc, True),
    "diffusers_dpmpp": partial(_grid, _diffusers_dpmpp, True),
}
