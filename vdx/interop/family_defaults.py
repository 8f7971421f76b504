"""Defaults of pretrained model families: how their makers draw clips with them.

The folder of a model holds its scheduler, and nothing else of these. Sources: the files
`wan/configs/*.py`, `generate.py` and README.md of the repositories Wan-Video/Wan2.1 and
Wan-Video/Wan2.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vdx.interop.pretrained import PretrainedModel

# The makers' negative prompts, the words of their configs.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_IMAGE = "镜头晃动，" + NEGATIVE
NEGATIVE_FIRST_LAST = "镜头切换，" + NEGATIVE_IMAGE
SMALL_AREA = 480 * 832  # pixels of the makers' 480p, for which I2V has another shift
WIDTH_1P3B = 1536  # features of a token of Wan 2.1 1.3B


@dataclasses.dataclass(frozen=True)
class FamilyDefaults:
    """The clip and the sampling that the makers of a family recommend."""

    height: int = 480  # pixels
    width: int = 832
    num_frames: int = 81
    fps: float = 16.0
    steps: int = 50
    guidance: tuple[float, ...] = (5.0,)  # of each expert, that of high noise first
    negative_prompt: str = NEGATIVE
    small_shift: float | None = None  # shift up to SMALL_AREA; None: the scheduler's
    preprocess: str = "official"  # how images are prepared: a row of vdx.generate.preprocess


# Wan 2.1: wan_t2v_14B; the README recommends guidance 6 for 1.3B.
WAN21 = FamilyDefaults()
WAN21_1P3B = FamilyDefaults(guidance=(6.0,))
# VACE: its videos and references are prepared as diffusers does; the makers' way is not there.
WAN21_VACE = FamilyDefaults(preprocess="diffusers")
# generate.py takes 40 steps for images, and shift 3 at 480p.
WAN21_IMAGE = FamilyDefaults(steps=40, negative_prompt=NEGATIVE_IMAGE, small_shift=3.0)
WAN21_FIRST_LAST = FamilyDefaults(negative_prompt=NEGATIVE_FIRST_LAST)
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
    if model.reads_control:
        return WAN21_VACE
    if not model.reads_images:
        width = model.experts[0].module.backbone_config["width"]
        return WAN21_1P3B if width == WIDTH_1P3B else WAN21
    # First and last frame (FLF2V): image tokens have positions.
    first_and_last = model.signals.get("image_tokens", {}).get("positions")
    return WAN21_FIRST_LAST if first_and_last else WAN21_IMAGE


def default_settings(model: PretrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a request that the caller may leave out.

    given: what the caller does not leave out. A folder converted from the makers' own follows them
    in everything. A folder of diffusers follows diffusers in sampler, timesteps, shift, negative
    prompt, preparation of images, and in guidance where the makers' code has the same default.
    Raises WeightsError for a scheduler that vdx does not have.
    """
    family = family_defaults(model)
    settings = dataclasses.asdict(family)
    small_shift = settings.pop("small_shift")

    if not model.official:
        settings |= {"negative_prompt": "", "preprocess": "diffusers"}
        if family is WAN21_1P3B:
            settings["guidance"] = WAN21.guidance
        small_shift = None

    # The scheduler's own, unless all of it is given.
    if not {"sampler", "timesteps", "shift"} <= given.keys():
        settings |= model.schedule()._asdict()
    area = given.get("height", family.height) * given.get("width", family.width)
    if small_shift is not None and area <= SMALL_AREA:
        settings["shift"] = small_shift
    return settings
