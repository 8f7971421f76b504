"""Control from scratch on a laptop: one kind of control signal, named by the variant.

    python -m vdx.main --config=configs/control_tiny.py:depth --workdir=runs/depth
    python -m vdx.sample --workdir=runs/depth --control=depth=depth.npy --prompt="a red circle ..."

Variants: depth, pose, flow (sparse hints), camera (pans over patterned backgrounds), actions (an
object that is controlled frame by frame). Otherwise the scenes of t2v_tiny; 2 CPU cores and 4 GB.
docs/measured/control.md has the time and the result of each.
"""

from ml_collections import ConfigDict

from configs import t2v_tiny

VARIANTS = ("depth", "pose", "flow", "camera", "actions")


def get_config(variant: str = "depth") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"control_tiny has the variants {', '.join(VARIANTS)}, not {variant!r}.")
    config = t2v_tiny.get_config()
    config.data.clip = ConfigDict({"num_frames": 8, "fps": 8.0})
    del config.model.signals["num_frames"], config.model.signals["fps"]
    config.model.signals[variant] = ConfigDict({"dropout": 0.1})
    if variant == "flow":
        config.data.clip.flow_points = 16
        config.sample.signal_guidance = ConfigDict({"flow": 2.0})
        config.model.signals.text.dropout = 0.4  # words describe the motion too
    elif variant == "camera":
        config.data.source.update(
            {
                "backgrounds": ("stripes", "dots", "checks"),
                "cameras": ("static", "pan left", "pan right"),
            }
        )
    elif variant == "actions":
        config.data.source.motions = ("steered",)
    config.eval = ConfigDict({"loss": {"every": 500, "clips": 64}, "control": {"clips": 64}})
    return config
