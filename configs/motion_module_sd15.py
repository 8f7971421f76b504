"""Motion modules for Stable Diffusion 1.5: an image model learns motion and keeps its weights.

    python -m vdx.prepare --source=FOLDER --out=/data/latents --until=latents \\
        --weights=stable-diffusion-v1-5 \\
        --config.latents.num_frames=16 --config.latents.height=256 --config.latents.width=256 \\
        --config.latents.fps=8
    python -m vdx.main --config=configs/motion_module_sd15.py --workdir=/mnt/runs/motion \\
        --config.weights=stable-diffusion-v1-5/unet --config.data.path=/data/latents

The recipe of AnimateDiff (Guo et al. 2023): 417 million parameters between the frames are trained
on cached latents of clips. The 860 million of the image model are frozen and in no checkpoint. A
new motion module changes nothing, so the first step predicts what the image model predicts. To
continue from public modules name both folders:
--config.weights="('stable-diffusion-v1-5/unet', 'animatediff-motion-adapter-v1-5-3')".

Data (docs/finetune.md): `latents` [16 32 32 4] of SD 1.5's VAE, times 0.18215, of 16 frames of
256x256; `text` [77 768], CLIP ViT-L/14's last hidden states; in the metadata `null` [77 768],
those of the empty caption. Betas are linear, as in AnimateDiff (the image model's own are
scaled_linear).

Hardware, computed and not measured: 1.7 GB of frozen bfloat16 weights, 8.3 GB of float32
parameters, average, moments and gradients of the modules, sharded over the chips by FSDP. A chip
of 16 GB holds both and a clip with its layers checkpointed. A clip takes 4e12 operations forward
and about 1.6e13 a step: at 40 % of the peak 0.2 s of a v5e chip. It has not been run on the public
weights. `:smoke` is the same program shrunk for the tests.
"""

from ml_collections import ConfigDict

from configs import t2v_base


def get_config(variant: str = "") -> ConfigDict:
    config = t2v_base.get_config(variant)
    config.update({"weights": "", "trainable": "/motion/"})
    config.model.backbone = ConfigDict(
        {
            "name": "unet",
            "channels": 4,
            "widths": (320, 640, 1280, 1280),
            "layers": 2,
            "attention": (True, True, True, False),
            "heads": 8,
            "groups": 32,
            "temporal": "motion",
            "motion_middle": False,
            "dtype": "bfloat16",
            "remat": "full",
        }
    )
    config.model.signals = ConfigDict(
        {
            "embeddings": {
                "features": 768,
                "length": 77,
                "null_tokens": 77,
                "project": False,
                "dropout": 0.1,
            }
        }
    )
    config.process = ConfigDict(
        {
            "name": "variance_preserving",
            "betas": "linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction": "noise",
        }
    )
    config.time_sampler = ConfigDict({"name": "uniform"})
    config.sample = ConfigDict({"sampler": "ddim", "steps": 25, "guidance": 7.5, "batch": 1})
    if variant == "smoke":
        config.model.backbone.update(
            {"widths": (16, 32), "layers": 1, "attention": (True, False), "heads": 2, "groups": 8}
        )
        config.model.signals.embeddings.features = 16
        config.train.update({"steps": 4, "save_every": 2})
        config.eval.loss.every = 4
    else:
        config.data.loader.global_batch = 256
        config.train.steps = 30_000
        config.eval.loss.update({"every": 1000, "clips": 256})
    return config
