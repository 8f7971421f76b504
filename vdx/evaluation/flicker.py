"""Flicker: brightness that changes from frame to frame where nothing moves."""

import dataclasses
from typing import ClassVar

import numpy as np

from vdx.config.ranges import Count
from vdx.evaluation.consistency import ConsistencyEvaluator
from vdx.metrics.temporal_consistency import flicker

__all__ = ["Flicker"]

# A clip is conclusive if the motion of this share of its pixels is known. Below it the few blocks
# that remain are those at rest, which flicker least.
LEAST_SHARE = 0.3


@dataclasses.dataclass(frozen=True)
class Flicker(ConsistencyEvaluator):
    """Flicker and motion of clips drawn for validation captions.

    Scores: `clips`; `flicker` in levels of luma, the mean over the conclusive clips;
    `motion`, the mean motion score; `conclusive`, the share of conclusive clips; the same
    for the data's own clips under `true`. A mean over no clip is NaN: inconclusive.
    """

    clips: Count = 8  # the optical flow of two frames of 192x256 takes half a second

    name: ClassVar[str] = "flicker"
    title: ClassVar[str] = "Flicker"
    about: ClassVar[str] = (
        "Levels of luma by which a frame leaves its motion-compensated neighbours; lower is "
        "better. A frozen clip does not flicker: read it together with the motion score."
    )
    score: ClassVar[str] = "flicker"
    label: ClassVar[str] = "flicker (levels of luma)"

    def score_clip(self, video: np.ndarray) -> float | None:
        """Return the flicker of a clip in levels of luma."""
        levels, share = flicker(video)
        return levels if share >= LEAST_SHARE else None
