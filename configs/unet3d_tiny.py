"""Text to video from scratch on a laptop, by a 3D U-Net.

    python -m vdx.main --config=configs/unet3d_tiny.py --workdir=runs/unet3d

The scenes, text, process and times of configs/t2v_tiny.py. A place of the U-Net's first level is
two frames of 4x4 pixels: 4 x 8 x 8 places of 64 features, then 4 x 4 x 4 of 96, which read the text.

A step takes 0.74 s of one core, measured while other programs ran, so that the run should take
under ten minutes of two. In 100 steps (of 24 clips) the loss fell from 0.42 to 0.10. Nobody has yet
run it to its end, so nothing is said of how it follows its prompts.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict({
        "seed": 0,
        "data": {
            "source": {
                "name": "scenes",
                "colours": ("red", "green", "blue", "yellow", "purple", "cyan"),
                "shapes": ("circle", "square", "triangle", "cross"),
                "motions": ("left", "right", "up", "down", "grow", "shrink"),
                "sizes": ("large",),
                "backgrounds": ("black",),
                "cameras": ("static",),
                "styles": ("flat",),
                "max_objects": 1,
            },
            "heldout": {"split": "heldout"},
            "clip": {"num_frames": (8,), "fps": (8.0,)},
            "height": 32,
            "width": 32,
            "loader": {"global_batch": 16},
        },
        "model": {
            "backbone": {"name": "unet", "channels": 3, "widths": (64, 96), "layers": 1,
                         "attention": (False, True), "head_width": 16, "heads": 4, "groups": 8,
                         "temporal": "3d", "stem": (2, 4, 4)},
            "signals": {
                "text": {"encoder": {"name": "bytes", "width": 96, "depth": 1, "heads": 3}},
            },
        },
        # The clip, not the noise, is what a narrow network can predict from large patches.
        "process": {"name": "rectified_flow", "prediction": "x0"},
        # What is drawn is decided between noise levels 0.3 and 0.97: train most there.
        "time": {"name": "logit_normal", "shift": 4.0},
        "loss": {"name": "velocity", "min_sigma": 0.3},
        "optim": {"method": "muon", "learning_rate": 4e-3, "warmup": 100, "schedule": "cosine"},
        "mesh": {"data": -1},
        "train": {
            "steps": 1000, "ema": 0.998, "eval_every": 500, "sample_every": 500,
            "save_every": 500, "log_every": 50,
            "wall": ("a red circle moves right", "a blue square moves up",
                     "a green triangle moves left", "a yellow cross grows",
                     "a purple circle grows", "a cyan square shrinks",
                     "a red triangle shrinks", "a blue cross moves down"),
        },
        "sample": {"sampler": "dpmpp_2m", "steps": 20, "guidance": 2.0, "shift": 4.0,
                   "batch": 32},
        "judge": {"prompts": 128},
    })
    if variant:
        raise ValueError(f"unet3d_tiny has no variant, and no {variant!r}.")
    return config
