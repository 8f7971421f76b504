"""Defaults of pretrained model families: how their makers draw clips with them.

The folder of a model holds its scheduler, and nothing else of these. Sources: the files
`wan/configs/*.py` and `generate.py` of the repositories Wan-Video/Wan2.1 and Wan-Video/Wan2.2.
"""

import dataclasses

from vdx.interop.pretrained import PretrainedModel


@dataclasses.dataclass(frozen=True)
class FamilyDefaults:
    """The clip and the sampling that the makers of a family recommend."""

    height: int = 480  # pixels
    width: int = 832
    num_frames: int = 81
    fps: float = 16.0
    steps: int = 50
    guidance: tuple[float, ...] = (5.0,)  # of each expert, that of high noise first


# Wan 2.1: wan_t2v_1_3B, wan_t2v_14B, FLF2V and VACE; generate.py takes 40 steps for images.
WAN21 = FamilyDefaults()
WAN21_IMAGE = FamilyDefaults(steps=40)
# Wan 2.2: wan_t2v_A14B.py, wan_i2v_A14B.py, wan_ti2v_5B.py.
WAN22_A14B = FamilyDefaults(steps=40, guidance=(4.0, 3.0))
WAN22_A14B_IMAGE = FamilyDefaults(steps=40, guidance=(3.5, 3.5))
WAN22_5B = FamilyDefaults(height=704, width=1280, num_frames=121, fps=24.0)


def family_defaults(model: PretrainedModel) -> FamilyDefaults:
    """Return the defaults of a model's family, which its architecture identifies."""
    if model.clamps_first_frame:
        return WAN22_5B
    if model.boundary:
        return WAN22_A14B_IMAGE if model.reads_images else WAN22_A14B
    # First and last frame (FLF2V): image tokens have positions.
    first_and_last = model.signals.get("image_tokens", {}).get("positions")
    return WAN21_IMAGE if model.reads_images and not first_and_last else WAN21
