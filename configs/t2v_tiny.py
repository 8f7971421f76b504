"""Text to video from scratch on a laptop.

    python -m vdx.main --config=configs/t2v_tiny.py --workdir=runs/tiny

Procedural scenes of one moving shape, 16 frames of 32x32 at 8 fps, pixel space.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({
        "seed": 0,
        "data": {
            "source": {
                "name": "scenes",
                "colours": ("red", "green", "blue", "yellow", "purple", "cyan"),
                "shapes": ("circle", "square", "triangle", "cross"),
                "backgrounds": ("black", "grey"),
                "cameras": ("static",),
                "styles": ("flat",),
                "max_objects": 1,
            },
            "heldout": {"split": "heldout"},
            "clip": {"num_frames": (16,), "fps": (8.0,)},
            "height": 32,
            "width": 32,
            "loader": {"global_batch": 32},
        },
        "model": {
            "backbone": {"name": "transformer", "width": 128, "depth": 4, "heads": 4,
                         "patch": (4, 8, 8), "pattern": "full"},
            "signals": {
                "text": {"encoder": {"name": "bytes", "width": 96, "depth": 1, "heads": 3}},
                "fps": {},
                "num_frames": {},
            },
        },
        # The clip, not the noise, is what a narrow network can predict from large patches.
        "process": {"name": "rectified_flow", "prediction": "x0"},
        "time": {"name": "uniform", "shift": 3.0},
        "loss": {"name": "none"},
        "optim": {"learning_rate": 2e-3, "warmup": 100, "schedule": "cosine"},
        "mesh": {"data": -1},
        "train": {
            "steps": 1200, "ema": 0.998, "eval_every": 300, "sample_every": 300,
            "save_every": 300,
            "wall": ("a red circle moves right", "a blue square moves up",
                     "a green triangle moves left", "a yellow cross turns",
                     "a purple circle grows", "a cyan square bounces",
                     "a red triangle shrinks", "a blue cross moves down"),
        },
        "sample": {"sampler": "dpmpp_2m", "steps": 20, "guidance": 3.0, "batch": 32},
        "judge": {"prompts": 128},
    })
