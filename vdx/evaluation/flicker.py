"""Flicker: brightness that changes from frame to frame where nothing moves."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from vdx.config.ranges import Count
from vdx.data.motion import motion_score
from vdx.evaluation.consistency import ConsistencyEvaluator, mean_of
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
    labels: ClassVar[dict[str, str]] = {
        "flicker": "flicker (levels of luma)",
        "motion": "motion score",
        "conclusive": "share of conclusive clips",
    }

    def score_clips(self, videos: Sequence[np.ndarray], fps: float) -> dict[str, float]:
        """Return flicker, motion and the share of conclusive clips."""
        values = []
        for video in videos:
            levels, share = flicker(video)
            if share >= LEAST_SHARE:
                values.append(levels)
        return {
            "flicker": mean_of(values),
            "motion": mean_of([motion_score(video, fps) for video in videos]),
            "conclusive": len(values) / max(len(videos), 1),
        }
