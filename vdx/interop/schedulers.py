"""Schedulers of diffusers as our samplers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vdx.config.ranges import Positive
from vdx.interop.keymap import WeightsError, listed

OVERRIDE = "Set --sampler, --timesteps and --shift"


# Fields of a scheduler_config.json that are read; the others are compared.
FIELDS = {"_class_name": str, "flow_shift": Positive, "shift": Positive}


class Schedule(NamedTuple):
    """A sampler and its noise levels."""

    sampler: str  # a row of SAMPLERS
    timesteps: str  # a row of TIMESTEPS
    shift: float


class Scheduler(NamedTuple):
    """A scheduler of diffusers that vdx has."""

    sampler: str  # a row of SAMPLERS
    timesteps: str  # a row of TIMESTEPS
    shift_key: str  # the field of its config that is the shift
    supported: Mapping[str, Any]  # fields of its config that must have these values


_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "num_train_timesteps": 1000,
}
_MULTISTEP = {
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    **_SIGMAS,
}
SCHEDULERS = {
    "UniPCMultistepScheduler": Scheduler(
        sampler="unipc",
        timesteps="diffusers_unipc",
        shift_key="flow_shift",
        supported={
            **_MULTISTEP,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": [],
        },
    ),
    "DPMSolverMultistepScheduler": Scheduler(
        sampler="dpmpp_2m",
        timesteps="diffusers_dpmpp",
        shift_key="flow_shift",
        supported={
            **_MULTISTEP,
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
        },
    ),
    "FlowMatchEulerDiscreteScheduler": Scheduler(
        sampler="euler",
        timesteps="diffusers_euler",
        shift_key="shift",
        supported={
            "use_dynamic_shifting": False,
            "shift_terminal": None,
            "stochastic_sampling": False,
            "invert_sigmas": False,
            **_SIGMAS,
        },
    ),
}


def schedule_of(config: Mapping[str, Any], path: Path) -> Schedule:
    """Return our schedule for the `scheduler_config.json` of the model in `path`.

    Raises WeightsError for a scheduler that vdx does not have.
    """
    name = str(config.get("_class_name"))
    if name not in SCHEDULERS:
        raise WeightsError(
            f"The scheduler of {path} is {name}; known are {', '.join(SCHEDULERS)}. {OVERRIDE}."
        )

    scheduler = SCHEDULERS[name]
    # Null, false and empty are equal here; an absent field has the supported value.
    other = [
        f"{key} = {config[key]!r}, not {value!r}"
        for key, value in scheduler.supported.items()
        if (config.get(key, value) or None) != (value or None)
    ]
    if other:
        head = f"vdx does not have the {name} of {path}. {OVERRIDE} to generate without it:"
        raise WeightsError(listed(head, other))

    shift = float(config.get(scheduler.shift_key, 1.0))
    return Schedule(scheduler.sampler, scheduler.timesteps, shift)
