"""Image to video on a TPU pod: t2v_base with first and last frames and a reference image.

    python -m vdx.prepare --source=FOLDER --out=/data/latents --until=latents \\
        --weights=Latte-1 --config.latents.fps=8 \\
        --config.latents.num_frames=16 --config.latents.height=256 --config.latents.width=256
    python -m vdx.main --config=configs/i2v_base.py --workdir=/mnt/runs/i2v_base \\
        --config.data.path=/data/latents

Hardware and data are those of t2v_base; `:smoke` is the same program shrunk for the tests. Known
frames are those of the clip's own latents. Besides `latents` and `text` the records hold
`image_tokens` float16 [257 1280], the features of the first frame by CLIP ViT-H (the last layer but
one, vdx/models/encoders/clip.py), for which Latte's folder has the `image_encoder` of Wan 2.1 I2V
copied into it, and `motion`, vdx.data.motion.motion_score of its pixels. Nothing has been trained
with this config yet, so no result is claimed for it.
"""

from ml_collections import ConfigDict

from configs import t2v_base


def get_config(variant: str = "") -> ConfigDict:
    config = t2v_base.get_config(variant)
    config.model.signals.update(
        {
            "known_frames": {"channels": 4, "first": 0.9, "last": 0.2, "dropout": 0.1},
            "image_tokens": {"features": 16 if variant == "smoke" else 1280, "dropout": 0.2},
            "motion": {"dropout": 0.2},
        }
    )
    config.sample.signal_guidance = ConfigDict({"known_frames": 1.5})
    return config
