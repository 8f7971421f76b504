"""Flicker: brightness that changes from frame to frame where nothing moves."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from vdx.config.ranges import Count
from vdx.data.motion import motion_score
from vdx.evaluation.consistency import comparison_table, comparison_text, mean_of, paired_clips
from vdx.evaluation.evaluator import EvaluationContext, Evaluator, Scores
from vdx.evaluation.html import LoggedRows
from vdx.metrics.temporal_consistency import flicker
from vdx.types import Params

__all__ = ["Flicker"]

# A clip is conclusive if the motion of this share of its pixels is known. Below it the few blocks
# that remain are those at rest, which flicker least.
LEAST_SHARE = 0.3
LABELS = {
    "flicker": "flicker (levels of luma)",
    "motion": "motion score",
    "conclusive": "share of conclusive clips",
}


@dataclasses.dataclass(frozen=True)
class Flicker(Evaluator):
    """Flicker and motion of clips drawn for validation captions.

    Scores: `clips`; `flicker` in levels of luma, the mean over the conclusive clips;
    `motion`, the mean motion score; `conclusive`, the share of conclusive clips; the same
    for the data's own clips under `true`. A mean over no clip is NaN: inconclusive.
    """

    clips: Count = 8  # the optical flow of two frames of 192x256 takes half a second

    title: ClassVar[str] = "Flicker"
    about: ClassVar[str] = (
        "Levels of luma by which a frame leaves its motion-compensated neighbours; lower is "
        "better. A frozen clip does not flicker: read it together with the motion score."
    )
    needs: ClassVar[tuple[str, ...]] = ("clips",)

    def prepare(self, context: EvaluationContext) -> Callable[[Params], Scores]:
        """See Evaluator."""
        return functools.partial(self._run, context)

    def _run(self, context: EvaluationContext, params: Params) -> Scores:
        pairs = paired_clips(context.drawing, params, self.clips)
        drawn = score_clips(pairs.drawn, context.drawing.fps)
        true = score_clips(pairs.true, context.drawing.fps)
        return {"clips": len(pairs.drawn), **drawn, "true": true}

    def logged(self, scores: Scores) -> dict[str, float]:
        """Return flicker, motion and the share of conclusive clips; see Evaluator."""
        return {f"flicker/{name}": scores[name] for name in LABELS}

    def text(self, scores: Scores) -> str:
        """Format a line for each number; see Evaluator."""
        return comparison_text("flicker", LABELS, scores)

    def section(self, scores: Scores, workdir: Path, logged: LoggedRows) -> str:
        """Show drawn clips and the data's own; see Evaluator."""
        return comparison_table(LABELS, scores)


def score_clips(videos: Sequence[np.ndarray], fps: float) -> dict[str, float]:
    """Score clips, each uint8 [t h w 3]: flicker, motion, and share conclusive."""
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
