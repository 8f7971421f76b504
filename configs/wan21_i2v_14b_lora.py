"""Low-rank adapters for Wan 2.1 I2V 14B: image to video in the style of your clips.

    python -m vdx.prepare --source=FOLDER --out=/data/latents --until=latents \\
        --weights=Wan2.1-I2V-14B-480P-Diffusers
    python -m vdx.main --config=configs/wan21_i2v_14b_lora.py --workdir=/mnt/runs/i2v \\
        --config.weights=Wan2.1-I2V-14B-480P-Diffusers/transformer --config.data.path=/data/latents

docs/finetune.md describes the data. Besides the latents and the text of a clip they hold `concat`,
the mask and the latents of its first frame, and `image_tokens`, CLIP's features of it. Rank 32 on
every projection of attention and of the MLPs: 180 million parameters.

Hardware, computed and not measured, for clips of 17 frames of 480x832 (7,800 tokens): 33 GB of
frozen bfloat16 weights and 3.6 GB of float32 adapters with their average, moments and gradients,
sharded over the chips by FSDP, and 3 GB of checkpointed activations a clip. Eight H100, or a
v5p-16 slice. A clip takes 1.0e15 operations a step: at 40 % of the peak 2.5 s of an H100. `:smoke`
is the same program shrunk for the tests.
"""

from ml_collections import ConfigDict

from configs import wan21_t2v_1p3b_lora


def get_config(variant: str = "") -> ConfigDict:
    config = wan21_t2v_1p3b_lora.get_config(variant)
    smoke = variant == "smoke"
    config.model.backbone.size = "wan_14b"
    # The image is never dropped: Wan was not trained without it.
    config.model.signals.update(
        {
            "concat": {"channels": 8 if smoke else 20, "dropout": 0.0},
            "image_tokens": {"features": 24 if smoke else 1280, "dropout": 0.0},
        }
    )
    config.time_sampler.shift = config.sample.shift = 3.0
    if not smoke:
        config.sample.steps = 40
    return config
