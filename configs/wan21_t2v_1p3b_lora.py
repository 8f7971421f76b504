"""Low-rank adapters for Wan 2.1 T2V 1.3B: a style, a subject or a motion from a few dozen clips.

    python -m vdx.main --config=configs/wan21_t2v_1p3b_lora.py --workdir=runs/lora \\
        --config.weights=Wan2.1-T2V-1.3B-Diffusers/transformer --config.data.path=/data/latents

See docs/finetune.md for the data and for what becomes of the adapters. Rank 32 beside every
projection of attention and of the MLPs: 44 million parameters. They alone are trained, averaged
and saved; the network stays as it was read.

Hardware, computed and not measured, for clips of 17 frames of 480x832 (7,800 tokens): one chip of
24 GB. 2.8 GB of frozen bfloat16 weights, 0.9 GB of float32 adapters with their average, moments
and gradients; beside it 0.7 GB of checkpointed activations and 9 GB for one layer's attention a
clip. A clip takes 1.2e14 operations a step: at 40 % of the peak 0.3 s of an H100. `:smoke` is the
same program shrunk for the tests.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict({
        "seed": 0,
        "weights": "",
        "lora": {"rank": 32, "alpha": 32.0, "dropout": 0.0},
        "data": {
            "path": "",
            "heldout": {"split": "heldout"},
            "loader": {"global_batch": 8, "workers": 4},
        },
        "model": {
            "backbone": {
                "name": "transformer", "size": "wan_1p3b", "channels": 16, "patch": (1, 2, 2),
                "pattern": "full", "dtype": "bfloat16", "remat": "full",
            },
            "signals": {"embeddings": {"features": 4096, "length": 512, "dropout": 0.1}},
        },
        "process": {"name": "rectified_flow", "prediction": "velocity"},
        "time": {"name": "uniform", "shift": 5.0},
        "loss": {"name": "none"},
        "optim": {"learning_rate": 1e-4, "warmup": 50, "schedule": "constant",
                  "weight_decay": 0.01, "accumulate": 1},
        "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
        "train": {"steps": 2000, "ema": 0.99, "log_every": 20, "eval_every": 250,
                  "sample_every": 0, "save_every": 250, "eval_clips": 16},
        "sample": {"sampler": "unipc", "steps": 50, "guidance": 5.0, "shift": 5.0, "batch": 1},
    })
    config.data.source = ConfigDict({"name": "records", "path": config.data.get_ref("path")})
    if variant == "smoke":
        config.lora.rank = 4
        config.data.loader.workers = 0
        config.model.backbone.update({"channels": 4, "width": 48, "depth": 2, "heads": 2,
                                      "mlp_ratio": 2.0})
        config.model.signals.embeddings.features = 16
        config.train.update({"steps": 4, "log_every": 1, "eval_every": 4, "save_every": 2,
                             "eval_clips": 8})
    elif variant:
        raise ValueError(f"wan21_t2v_1p3b_lora has the variant 'smoke', not {variant!r}.")
    return config
