"""Low-rank adapters for Wan 2.2 TI2V 5B, text to video and image to video in one network.

    python -m vdx.prepare --source=FOLDER --out=/data/latents --until=latents \\
        --weights=Wan2.2-TI2V-5B-Diffusers \\
        --config.latents.num_frames=49 --config.latents.height=704 --config.latents.width=1280 \\
        --config.latents.fps=24
    python -m vdx.main --config=configs/wan22_ti2v_5b_lora.py --workdir=/mnt/runs/ti2v \\
        --config.weights=Wan2.2-TI2V-5B-Diffusers/transformer --config.data.path=/data/latents

docs/finetune.md describes the data: latents of Wan 2.2's VAE, 48 channels, 16 times smaller in
space and 4 times in time. In half of the clips the first latent frame is given, clean and at time 0
(`first_frame`), and the network continues it. Rank 32 on every projection of attention and of the
MLPs: 81 million parameters.

Hardware, computed and not measured, for clips of 49 frames of 704x1280 (11,440 tokens): 10 GB of
frozen bfloat16 weights and 1.6 GB of float32 adapters with their average, moments and gradients,
sharded over the chips by FSDP, and 2 GB of checkpointed activations a clip. One H100, or several.
A clip takes 5.5e14 operations a step: at 40 % of the peak 1.4 s of an H100. `:smoke` is the same
program shrunk for the tests.
"""

from ml_collections import ConfigDict

from configs import wan21_t2v_1p3b_lora


def get_config(variant: str = "") -> ConfigDict:
    config = wan21_t2v_1p3b_lora.get_config(variant)
    config.first_frame = 0.5
    config.model.backbone.size = "wan_5b"
    if variant != "smoke":
        config.model.backbone.channels = 48
    return config
