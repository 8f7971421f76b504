"""Low-rank adapters for Wan 2.1 I2V 14B: how images come to life.

    python -m vdx.main --config=configs/wan21_i2v_14b_lora.py --workdir=/mnt/runs/i2v \\
        --config.weights=Wan2.1-I2V-14B-480P-Diffusers/transformer --config.data.path=/data/latents

See docs/finetune.md for the data; beside the latents and the text of a clip it holds `concat`,
the mask and the latents of its first frame, and `image_tokens`, CLIP's features of it. Rank 32
beside every projection of attention and of the MLPs: 180 million parameters.

Hardware, computed and not measured, for clips of 17 frames of 480x832 (7,800 tokens): 33 GB of
frozen bfloat16 weights and 3.6 GB of float32 adapters with their average, moments and gradients,
split over the chips by FSDP; beside it 3 GB of checkpointed activations and 29 GB for one layer's
attention a clip. Eight H100, or a v5p-16 slice. A clip takes 1.0e15 operations a step: at 40 % of
the peak 2.5 s of an H100. `:smoke` is the same program shrunk for the tests.
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
                "name": "transformer", "size": "wan_14b", "channels": 16, "patch": (1, 2, 2),
                "pattern": "full", "dtype": "bfloat16", "remat": "full",
            },
            # The image is never dropped: Wan has not learned to do without.
            "signals": {"embeddings": {"features": 4096, "length": 512, "dropout": 0.1},
                        "concat": {"channels": 20, "dropout": 0.0},
                        "image_tokens": {"features": 1280, "dropout": 0.0}},
        },
        "process": {"name": "rectified_flow", "prediction": "velocity"},
        "time": {"name": "uniform", "shift": 3.0},
        "loss": {"name": "none"},
        "optim": {"learning_rate": 1e-4, "warmup": 50, "schedule": "constant",
                  "weight_decay": 0.01},
        "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
        "train": {"steps": 2000, "ema": 0.99, "log_every": 20, "eval_every": 250,
                  "sample_every": 0, "save_every": 250, "eval_clips": 16},
        "sample": {"sampler": "unipc", "steps": 40, "guidance": 5.0, "shift": 3.0, "batch": 1},
    })
    config.data.source = ConfigDict({"name": "records", "path": config.data.get_ref("path")})
    if variant == "smoke":
        config.lora.rank = 4
        config.data.loader.workers = 0
        config.model.backbone.update({"channels": 4, "width": 48, "depth": 2, "heads": 2,
                                      "mlp_ratio": 2.0})
        config.model.signals.embeddings.features = 16
        config.model.signals.concat.channels = 8
        config.model.signals.image_tokens.features = 24
        config.train.update({"steps": 4, "log_every": 1, "eval_every": 4, "save_every": 2,
                             "eval_clips": 8})
    elif variant:
        raise ValueError(f"wan21_i2v_14b_lora has the variant 'smoke', not {variant!r}.")
    return config
