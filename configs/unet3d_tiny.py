"""Text to video from scratch on a laptop, by a 3D U-Net.

    python -m vdx.main --config=configs/unet3d_tiny.py --workdir=runs/unet3d

The scenes, text, process and times of configs/t2v_tiny.py.
"""

from ml_collections import ConfigDict

from configs import t2v_tiny


def get_config(variant: str = "") -> ConfigDict:
    if variant:
        raise ValueError(f"unet3d_tiny has no variant {variant!r}.")
    config = t2v_tiny.get_config()
    config.data.clip = ConfigDict({"num_frames": 8, "fps": 8.0})
    del config.model.signals["fps"], config.model.signals["num_frames"]
    config.model.backbone = ConfigDict({
        "name": "unet", "channels": 3, "widths": (64, 96), "layers": 1, "attention": (False, True),
        "head_width": 16, "heads": 4, "groups": 8, "temporal": "3d", "stem": (2, 4, 4)})
    config.train.update({"steps": 1200, "eval_every": 400, "sample_every": 400, "save_every": 400})
    return config
