"""Low-rank adapters for Wan 2.1 T2V 1.3B: a style, a subject or a motion from a few dozen clips.

    python -m vdx.prepare --source=FOLDER --out=/data/latents --until=latents \\
        --weights=Wan2.1-T2V-1.3B-Diffusers
    python -m vdx.main --config=configs/wan21_t2v_1p3b_lora.py --workdir=runs/lora \\
        --config.weights=Wan2.1-T2V-1.3B-Diffusers/transformer --config.data.path=/data/latents

docs/finetune.md describes the data and the use of the adapters. Rank 32 on every projection of
attention and of the MLPs: 44 million parameters. They alone are trained, averaged and saved; the
network is frozen.

Hardware, computed and not measured, for clips of 17 frames of 480x832 (7,800 tokens): one chip of
24 GB. 2.8 GB of frozen bfloat16 weights, 0.9 GB of float32 adapters with their average, moments
and gradients, and 0.7 GB of checkpointed activations a clip. A clip takes 1.2e14 operations a
step: at 40 % of the peak 0.3 s of an H100. `:smoke` is the same program shrunk for the tests.
"""

from ml_collections import ConfigDict

from configs import wan21_t2v_1p3b


def get_config(variant: str = "") -> ConfigDict:
    config = wan21_t2v_1p3b.get_config(variant)
    config.lora = ConfigDict({"rank": 32, "alpha": 32.0, "dropout": 0.0})
    config.optim.update({"learning_rate": 1e-4, "warmup_steps": 50})
    config.train.ema = 0.99
    if variant == "smoke":
        config.lora.rank = 4
    else:
        config.data.loader.update({"global_batch": 8, "workers": 4})
        config.train.update({"steps": 2000, "save_every": 250})
        config.eval.loss.update({"every": 250, "clips": 16})
    return config
