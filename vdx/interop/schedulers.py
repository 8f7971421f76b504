"""Schedulers of diffusers as samplers of ours."""

from typing import Any

# Scheduler of diffusers: (our sampler, its grid, its name for the shift, what ours takes for
# granted).
_MULTISTEP = {
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "num_train_timesteps": 1000,
}
SCHEDULERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "UniPCMultistepScheduler": (
        "unipc",
        "diffusers_unipc",
        "flow_shift",
        {**_MULTISTEP, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []},
    ),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        "diffusers_dpmpp",
        "flow_shift",
        {**_MULTISTEP, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    ),
    "FlowMatchEulerDiscreteScheduler": (
        "euler",
        "diffusers_euler",
        "shift",
        {
            "use_dynamic_shifting": False,
            "shift_terminal": None,
            "stochastic_sampling": False,
            "invert_sigmas": False,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "num_train_timesteps": 1000,
        },
    ),
}
