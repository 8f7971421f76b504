"""Low-rank adapters for Wan 2.2 TI2V 5B, text to video and image to video in one network.

    python -m vdx.main --config=configs/wan22_ti2v_5b_lora.py --workdir=/mnt/runs/ti2v \\
        --config.weights=Wan2.2-TI2V-5B-Diffusers/transformer --config.data.path=/data/latents

See docs/finetune.md for the data: latents of Wan 2.2's VAE, 48 channels, 16 times smaller in space
and 4 times in time. Half of the clips are learned as the continuation of their first latent frame,
which is then given to the network clean and at time 0 (`first_frame`). Rank 32 beside every
projection of attention and of the MLPs: 81 million parameters.

Hardware, computed and not measured, for clips of 49 frames of 704x1280 (11,440 tokens): 10 GB of
frozen bfloat16 weights and 1.6 GB of float32 adapters with their average, moments and gradients,
split over the chips by FSDP; beside it 2 GB of checkpointed activations and 38 GB for one layer's
attention a clip. One H100, or several. A clip takes 5.5e14 operations a step: at 40 % of the peak
1.4 s of an H100. `:smoke` is the same program shrunk for the tests.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict({
        "seed": 0,
        "weights": "",
        "lora": {"rank": 32, "alpha": 32.0, "dropout": 0.0},
        "first_frame": 0.5,
        "data": {
            "path": "",
            "heldout": {"split": "heldout"},
            "loader": {"global_batch": 8, "workers": 4},
        },
        "model": {
            "backbone": {
                "name": "transformer", "size": "wan_5b", "channels": 48, "patch": (1, 2, 2),
                "pattern": "full", "dtype": "bfloat16", "remat": "full",
            },
            "signals": {"embeddings": {"features": 4096, "length": 512, "dropout": 0.1}},
        },
        "process": {"name": "rectified_flow", "prediction": "velocity"},
        "time": {"name": "uniform", "shift": 5.0},
        "loss": {"name": "none"},
        "optim": {"learning_rate": 1e-4, "warmup": 50, "schedule": "constant",
                  "weight_decay": 0.01},
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
        raise ValueError(f"wan22_ti2v_5b_lora has the variant 'smoke', not {variant!r}.")
    return config
