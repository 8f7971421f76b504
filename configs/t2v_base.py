"""Text to video on a TPU pod: 16 frames of 256x256 at 8 fps, about 600M parameters.

    python -m vdx.prepare --source=FOLDER --out=/data/latents --until=latents \\
        --weights=Latte-1 --config.latents.fps=8 \\
        --config.latents.num_frames=16 --config.latents.height=256 --config.latents.width=256
    python -m vdx.main --config=configs/t2v_base.py --workdir=/mnt/runs/t2v_base \\
        --config.data.path=/data/latents

Hardware: written for a v5e-64 or v5p-32 slice (FSDP over all chips); any slice works whose chips
divide the batch of 512. `:smoke` is the same program shrunk for the tests.

The first line makes the data with Latte's encoders: `latents` float16 [16 32 32 4] of a per-frame
image VAE (8x smaller in space), normalised, and `text` float16 [l 4096] of T5-XXL with l at most
256. Nothing has been trained with this config yet, so no result is claimed for it.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "data": {
                "path": "",
                "validation": {"split": "validation"},
                "loader": {"global_batch": 512, "workers": 8},
            },
            "model": {
                "backbone": {
                    "name": "transformer",
                    "size": "XL",
                    "channels": 4,
                    "patch": (1, 2, 2),
                    "pattern": "factorized",
                    "dtype": "bfloat16",
                    "remat": "full",
                },
                "signals": {
                    "embeddings": {"features": 4096, "dropout": 0.1},
                    "fps": {"dropout": 0.1},
                    "num_frames": {"dropout": 0.1},
                },
            },
            "process": {"name": "rectified_flow", "prediction": "velocity"},
            "time_sampler": {"name": "logit_normal", "base_tokens": 1024},
            "loss": {"denoising": {"weighting": {"name": "none"}}},
            "optim": {
                "learning_rate": 1e-4,
                "warmup_steps": 1000,
                "schedule": "constant",
                "weight_decay": 0.01,
            },
            "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
            "train": {
                "steps": 400_000,
                "ema": 0.9999,
                "log_every": 50,
                "sample_every": 0,
                "save_every": 1000,
            },
            "sample": {"sampler": "unipc", "steps": 50, "guidance": 6.0, "shift": 2.0},
            "eval": {"loss": {"every": 5000, "clips": 512}},
        }
    )
    config.data.source = ConfigDict({"name": "records", "path": config.data.get_ref("path")})
    if variant == "smoke":
        config.data.loader.update({"global_batch": 8, "workers": 0})
        config.model.backbone.update({"width": 64, "depth": 4, "heads": 4})
        config.model.signals.embeddings.features = 32
        config.train.update({"steps": 3, "log_every": 1, "save_every": 3})
        config.eval.loss.update({"every": 3, "clips": 8})
    elif variant:
        raise ValueError(f"There is the variant 'smoke', and no {variant!r}.")
    return config
