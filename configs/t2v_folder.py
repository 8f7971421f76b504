"""Text to video on a folder of your own captioned clips, from scratch, in pixel space.

    python -m vdx.main --config=configs/t2v_folder.py --config.data.path=FOLDER \\
        --workdir=runs/folder

FOLDER holds videos and `metadata.jsonl` with rows {"file_name": ..., "caption": ...}, or videos
with a .txt of the same name. 8 frames of 32x32; 2 CPU cores, about 15 minutes. On 266 captioned
emoji animations the loss at fixed noise on training captions ends a third below the loss without
captions. So few clips are memorised: a caption from outside the training set harms.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "data": {
                "path": "",
                "validation": {"split": "validation"},
                # One second; shorter clips repeat.
                "clip": {"num_frames": (8,), "fps": (8.0,), "short": "loop"},
                "height": 32,
                "width": 32,
                "loader": {"global_batch": 24},
            },
            "model": {
                "backbone": {
                    "name": "transformer",
                    "width": 128,
                    "depth": 4,
                    "heads": 4,
                    "patch": (8, 4, 4),
                    "pattern": "full",
                    "absolute": True,
                    "rope_theta": 30.0,
                    "time_scale": 0.02,
                },
                "signals": {
                    "text": {"encoder": {"name": "bytes", "width": 96, "depth": 1, "heads": 3}},
                    "fps": {},
                    "num_frames": {},
                },
            },
            "process": {"name": "rectified_flow", "prediction": "x0"},
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
                "steps": 2500,
                "ema": 0.998,
                "sample_every": 500,
                "save_every": 500,
                "sample_prompts": (),
            },
            "sample": {
                "sampler": "dpmpp_2m",
                "steps": 20,
                "guidance": 2.0,
                "shift": 4.0,
                "batch": 16,
            },
            "eval": {"loss": {"every": 500, "clips": 64}, "flicker": {"clips": 8}},
        }
    )
    config.data.source = ConfigDict(
        {"name": "folder", "path": config.data.get_ref("path"), "split": "train"}
    )
    return config
