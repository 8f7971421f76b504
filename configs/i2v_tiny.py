"""Image to video from scratch on a laptop: first and last frame, motion strength, frame rate.

    python -m vdx.main --config=configs/i2v_tiny.py --workdir=runs/i2v
    python -m vdx.sample --workdir=runs/i2v --image=first.png --prompt="a red circle moves right"

The variant `reference` reads an image of the subject instead of frames of the clip.

The scenes of t2v_tiny at 4, 8 and 16 frames per second; 2 CPU cores and 4 GB.
docs/measured/control.md has the time and the result.
"""

from ml_collections import ConfigDict

from configs import t2v_tiny


def get_config(variant: str = "") -> ConfigDict:
    config = t2v_tiny.get_config()
    config.data.clip = ConfigDict({"num_frames": 8, "fps": (4.0, 8.0, 16.0)})
    del config.model.signals["num_frames"]
    if variant == "reference":
        config.model.signals.text.dropout = 0.4  # the image is often the only condition
        config.model.signals.reference = ConfigDict(
            {"encoder": {"name": "patches", "patch": 4}, "dropout": 0.1}
        )
        config.sample.signal_guidance = ConfigDict({"reference": 3.0})
        config.train.steps = 2500
    elif variant:
        raise ValueError(f"i2v_tiny has the variant 'reference', not {variant!r}.")
    else:
        config.model.backbone.skip = True
        config.model.signals.update(
            {
                "known_frames": {"first": 0.9, "last": 0.4, "dropout": 0.2},
                "motion": {"dropout": 0.3},
            }
        )
        config.sample.signal_guidance = ConfigDict({"motion": 2.0})
    config.eval.control = ConfigDict({"clips": 64})
    return config
