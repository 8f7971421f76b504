"""The base of the rows that score drawn clips next to the data's own."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from vdx.data.motion import motion_score
from vdx.evaluation.drawing import ClipDrawer
from vdx.evaluation.evaluator import EvaluationContext, Evaluator, Scores
from vdx.evaluation.html import LoggedRows, format_number, table
from vdx.types import Params

__all__ = ["ConsistencyEvaluator", "PairedClips", "mean_of", "paired_clips"]


class PairedClips(NamedTuple):
    """Clips drawn for captions, and the data's own; each uint8 [t h w 3]."""

    drawn: list[np.ndarray]
    true: list[np.ndarray]  # fewer, if records are shorter than a clip


def paired_clips(drawing: ClipDrawer, params: Params, count: int) -> PairedClips:
    """Draw `count` clips for validation captions, or fewer if there are fewer."""
    records = drawing.validation_records(count)
    drawn = drawing.draw(params, [record.caption for record in records])
    true = [drawing.true_clip(record) for record in records]
    return PairedClips(list(drawn), [video for video in true if video is not None])


def mean_of(values: Sequence[float]) -> float:
    """Return the mean, NaN if there are no values."""
    if not values:
        return float("nan")
    return float(np.mean(values))


@dataclasses.dataclass(frozen=True)
class ConsistencyEvaluator(Evaluator):
    """One consistency of clips drawn for validation captions, and of the data's own.

    Scores: `clips`, the number of drawn clips; the row's own number, the mean over the conclusive
    clips; `motion`, the mean motion score; `conclusive`, the share of conclusive clips; the same
    numbers for the data's own clips under `true`. A mean over no clip is NaN: inconclusive.
    """

    clips: int = 8  # drawn clips

    name: ClassVar[str]  # the row's name in EVALUATORS and in the log
    score: ClassVar[str]  # the name of the row's own number
    label: ClassVar[str]  # what it is, for people
    needs: ClassVar[tuple[str, ...]] = ("clips",)

    @abc.abstractmethod
    def score_clip(self, video: np.ndarray) -> float | None:
        """Return the number of a clip uint8 [t h w 3]; None if it is inconclusive."""

    @property
    def labels(self) -> dict[str, str]:
        """The scores, and what they are."""
        return {
            self.score: self.label,
            "motion": "motion score",
            "conclusive": "share of conclusive clips",
        }

    def score_clips(self, videos: Sequence[np.ndarray], fps: float) -> dict[str, float]:
        """Return a number for each of `labels`, of clips that are each uint8 [t h w 3]."""
        scores = [self.score_clip(video) for video in videos]
        conclusive = [score for score in scores if score is not None]
        return {
            self.score: mean_of(conclusive),
            "motion": mean_of([motion_score(video, fps) for video in videos]),
            "conclusive": len(conclusive) / max(len(videos), 1),
        }

    def prepare(self, context: EvaluationContext) -> Callable[[Params], Scores]:
        """See Evaluator."""
        return functools.partial(self._run, context)

    def _run(self, context: EvaluationContext, params: Params) -> Scores:
        pairs = paired_clips(context.drawing, params, self.clips)
        drawn = self.score_clips(pairs.drawn, context.drawing.fps)
        true = self.score_clips(pairs.true, context.drawing.fps)
        return {"clips": len(pairs.drawn), **drawn, "true": true}

    def logged(self, scores: Scores) -> dict[str, float]:
        """Return the numbers of the drawn clips; see Evaluator."""
        return {f"{self.name}/{key}": scores[key] for key in self.labels}

    def text(self, scores: Scores) -> str:
        """Format a line for each number; see Evaluator."""
        heading = f"{self.title.lower()}, {scores['clips']} clips"
        lines = [f"{heading:34}{'model':>9}{'true':>9}"]
        for key, label in self.labels.items():
            model = format_number(scores[key])
            true = format_number(scores["true"][key])
            lines.append(f"{label:34}{model:>9}{true:>9}")
        return "\n".join(lines)

    def section(self, scores: Scores, workdir: Path, logged: LoggedRows) -> str:
        """Show the drawn clips' numbers next to the data's; see Evaluator."""
        if "clips" not in scores:
            return ""
        true = scores.get("true", {})
        lines = [
            [label, format_number(scores.get(key)), format_number(true.get(key))]
            for key, label in self.labels.items()
        ]
        return table(["", "generated clips", "clips of the data"], lines, "values")
