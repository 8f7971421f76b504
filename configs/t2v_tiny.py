"""Text to video from scratch on a laptop.

    python -m vdx.main --config=configs/t2v_tiny.py --workdir=runs/tiny

Procedural scenes of one moving shape, 8 frames of 32x32 at 8 fps, in pixel space; 2 CPU cores and
4 GB. It takes four to eleven minutes, and 89.8 % of 128 validation prompts come out right in
colour, shape and motion.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        {
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
                "validation": {"split": "validation"},
                # Every sixth batch is longer; samples have the first length and rate.
                "clip": {"num_frames": (8, 8, 8, 8, 8, 16), "fps": (8.0, 4.0)},
                "height": 32,
                "width": 32,
                "loader": {"global_batch": 24},
            },
            "model": {
                "backbone": {
                    "name": "transformer",
                    "width": 128,
                    "depth": 3,
                    "heads": 4,
                    "patch": (8, 4, 4),
                    "pattern": "full",
                    "absolute": True,
                    "rope_theta": 30.0,  # low: the token grid is only 8 wide
                    "time_scale": 0.02,
                },
                "signals": {
                    "text": {
                        "encoder": {
                            "name": "bytes",
                            "length": 64,  # one caption of 50 has 64 and loses its last letter
                            "words": 24,
                            "width": 96,
                            "depth": 1,
                            "heads": 3,
                        }
                    },
                    "fps": {},
                    "num_frames": {},
                },
            },
            # x0: a narrow network cannot predict the noise of large patches.
            "process": {"name": "rectified_flow", "prediction": "x0"},
            # Samples are decided between noise levels 0.3 and 0.97: train most there.
            "time_sampler": {"name": "logit_normal", "shift": 4.0},
            "loss": {"denoising": {"weighting": {"name": "velocity", "min_sigma": 0.3}}},
            "optim": {
                "name": "muon",
                "learning_rate": 4e-3,
                "warmup_steps": 100,
                "schedule": "cosine",
            },
            "mesh": {"data": -1},
            "train": {
                "steps": 1500,
                "ema": 0.998,
                "sample_every": 500,
                "save_every": 500,
                "log_every": 50,
                "sample_prompts": (
                    "a red circle moves right",
                    "a blue square moves up",
                    "a green triangle moves left",
                    "a yellow cross grows",
                    "a purple circle grows",
                    "a cyan square shrinks",
                    "a red triangle shrinks",
                    "a blue cross moves down",
                ),
            },
            "sample": {
                "sampler": "dpmpp_2m",
                "steps": 20,
                "guidance": 2.0,
                "shift": 4.0,
                "batch": 32,
            },
            "eval": {
                "loss": {"every": 500, "clips": 64},
                "prompt_following": {"prompts": 128},
                "flicker": {"clips": 8},
                "identity_drift": {"clips": 24},
            },
        }
    )
    if variant == "minilm":  # a pretrained, frozen encoder instead of the byte-level one
        del config.model.signals["text"]
        config.model.signals.embeddings = ConfigDict(
            {"features": 384, "encoder": {"name": "minilm", "length": 24}}
        )
    elif variant == "stream":  # clips of any length, in blocks of 4 frames (docs/temporal.md)
        config.diffusion_forcing = True
        config.model.backbone.patch = (4, 4, 4)
        with config.ignore_type():
            config.model.backbone.pattern = ({"name": "full", "block": 1, "window": 2},)
        config.data.clip = ConfigDict({"num_frames": (16,), "fps": (8.0,)})
        del config.model.signals["num_frames"]
    elif variant:
        raise ValueError(f"t2v_tiny has the variants 'minilm' and 'stream', not {variant!r}.")
    return config
