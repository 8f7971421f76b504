"""Fine-tune every weight of Wan 2.1 T2V 1.3B on your own clips.

    python -m vdx.prepare --source=FOLDER --out=/data/latents --until=latents \\
        --weights=Wan2.1-T2V-1.3B-Diffusers
    python -m vdx.main --config=configs/wan21_t2v_1p3b.py --workdir=/mnt/runs/wan \\
        --config.weights=Wan2.1-T2V-1.3B-Diffusers/transformer --config.data.path=/data/latents

weights: a transformer of diffusers, of the original repository, or one file of ComfyUI's;
docs/finetune.md describes the data. The objective is Wan's: the velocity of rectified flow, the
network's time is 1000 t, times are uniform before a shift of 5.

Hardware, computed and not measured, for clips of 17 frames of 480x832 (7,800 tokens): 28 GB of
float32 weights, average, moments and gradients, sharded over the chips by FSDP, and 0.7 GB of
checkpointed activations a clip. Attention does not write out its scores, so memory grows with the
tokens and not with their square. A clip takes 1.3e14 operations a step: at 40 % of the peak 0.3 s
of an H100, 1.7 s of a v5e chip. `:smoke` is the same program shrunk for the tests.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "weights": "",
            "data": {
                "path": "",
                "validation": {"split": "validation"},
                "loader": {"global_batch": 64, "workers": 8},
            },
            "model": {
                "backbone": {
                    "name": "transformer",
                    "size": "wan_1p3b",
                    "channels": 16,
                    "patch": (1, 2, 2),
                    "pattern": "full",
                    "dtype": "bfloat16",
                    "remat": "full",
                },
                "signals": {"embeddings": {"features": 4096, "length": 512, "dropout": 0.1}},
            },
            "process": {"name": "rectified_flow", "prediction": "velocity"},
            "time_sampler": {"name": "uniform", "shift": 5.0},
            "loss": {"denoising": {"weighting": {"name": "none"}}},
            "optim": {
                "learning_rate": 1e-5,
                "warmup_steps": 200,
                "schedule": "constant",
                "weight_decay": 0.01,
            },
            "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
            "train": {
                "steps": 5000,
                "ema": 0.999,
                "log_every": 20,
                "sample_every": 500,
                "save_every": 500,
            },
            "sample": {"sampler": "unipc", "steps": 50, "guidance": 5.0, "shift": 5.0, "batch": 1},
            "eval": {"loss": {"every": 500, "clips": 64}},
        }
    )
    config.data.source = ConfigDict({"name": "records", "path": config.data.get_ref("path")})
    if variant == "smoke":
        config.data.loader.update({"global_batch": 8, "workers": 0})
        config.model.backbone.update(
            {"channels": 4, "width": 48, "depth": 2, "heads": 2, "mlp_ratio": 2.0}
        )
        config.model.signals.embeddings.features = 16
        config.train.update({"steps": 4, "log_every": 1, "save_every": 2, "sample_every": 4})
        config.sample.steps = 2
        config.eval.loss.update({"every": 4, "clips": 8})
    elif variant:
        raise ValueError(f"There is the variant 'smoke', and no {variant!r}.")
    return config
