"""The parts that the rows of temporal consistency share: clips, means, tables."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vdx.evaluation.drawing import ClipDrawer
from vdx.evaluation.evaluator import Scores
from vdx.evaluation.html import format_number, table
from vdx.types import Params

__all__ = ["PairedClips", "comparison_table", "comparison_text", "mean_of", "paired_clips"]


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


def comparison_text(title: str, labels: Mapping[str, str], scores: Scores) -> str:
    """Format scores next to those of the data's own clips, for a terminal."""
    heading = f"{title}, {scores['clips']} clips"
    lines = [f"{heading:34}{'model':>9}{'true':>9}"]
    for key, label in labels.items():
        model = format_number(scores[key])
        true = format_number(scores["true"][key])
        lines.append(f"{label:34}{model:>9}{true:>9}")
    return "\n".join(lines)


def comparison_table(labels: Mapping[str, str], scores: Scores) -> str:
    """Format scores next to those of the data's own clips, as HTML; "" for none."""
    if "clips" not in scores:
        return ""
    true = scores.get("true", {})
    lines = [
        [label, format_number(scores.get(key)), format_number(true.get(key))]
        for key, label in labels.items()
    ]
    return table(["", "generated clips", "clips of the data"], lines, "values")
