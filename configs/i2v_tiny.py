"""Image to video from scratch on a laptop: first and last frame, reference picture, motion.

    python -m vdx.main --config=configs/i2v_tiny.py --workdir=runs/i2v
    python -m vdx.sample --workdir=runs/i2v --image=first.png --prompt="a red circle moves right"

The scenes of t2v_tiny at 4, 8 and 16 frames per second; 2 CPU cores and 4 GB. docs/steering.md has
the time it takes and what it reaches.
"""

from ml_collections import ConfigDict

from configs import t2v_tiny


def get_config(variant: str = "") -> ConfigDict:
    if variant:
        raise ValueError(f"i2v_tiny has no variant {variant!r}.")
    config = t2v_tiny.get_config()
    config.data.clip = ConfigDict({"num_frames": 8, "fps": (4.0, 8.0, 16.0)})
    config.model.signals.update({
        "known_frames": {"first": 0.7, "last": 0.3, "dropout": 0.3},
        "reference": {"encoder": {"name": "patches", "patch": 8}, "dropout": 0.3},
        "motion": {"dropout": 0.3},
    })
    config.judge.steering = 64
    return config
