"""How much is kept: which thresholds cost most, and what would keep more."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vdx.data.curation.decide import BELOW, REASONS, DecideSettings, is_beyond

__all__ = ["LITTLE", "explain"]

LITTLE = 0.5  # a smaller share of the seconds is explained
MOST_REASONS = 5  # in the explanation
SHARES = (0.5, 1.0)  # of the seconds that a threshold costs alone, for which another is given

Row = Mapping[str, Any]


def explain(rows: Sequence[Row], settings: DecideSettings) -> str:
    """Return how much is kept; if it is little, also why, and what keeps more.

    rows: of clips.jsonl. A reason costs alone what no other reason drops.
    """
    total = sum(map(_seconds, rows))
    kept = [row for row in rows if row["verdict"] == "keep"]
    seconds = sum(map(_seconds, kept))
    text = f"Kept {len(kept)} of {len(rows)} clips, {seconds:.1f} of {total:.1f} seconds."
    if not rows or seconds >= LITTLE * total:
        return text

    reasons = {reason for row in rows for reason in row["reasons"]}
    costs = {reason: _costs(rows, reason) for reason in reasons}
    ordered = sorted(reasons, key=lambda reason: (*(-cost for cost in costs[reason]), reason))
    lines = [text, "Seconds dropped (by this reason alone):"]
    for reason in ordered[:MOST_REASONS]:
        alone, shared = costs[reason]
        lines.append(f"  {reason}: {shared:.1f} ({alone:.1f})")
        lines += [f"    {line}" for line in _remedies(rows, reason, settings)]
    return "\n".join(lines)


def _seconds(row: Row) -> float:
    """Return the length of a clip."""
    return float(row["end"] - row["start"])


def _costs(rows: Sequence[Row], reason: str) -> tuple[float, float]:
    """Return the seconds that a reason drops alone, and those that it drops at all."""
    dropped = [row for row in rows if reason in row["reasons"]]
    alone = [row for row in dropped if len(row["reasons"]) == 1]
    return sum(map(_seconds, alone)), sum(map(_seconds, dropped))


def _remedies(rows: Sequence[Row], reason: str, settings: DecideSettings) -> list[str]:
    """Return the settings that would keep clips which a reason drops alone."""
    alone = [row for row in rows if row["reasons"] == [reason]]
    seconds = sum(map(_seconds, alone))
    if not alone:
        return ["no setting of this reason alone keeps more"]
    if reason == "caption_missing":
        return [f"--config.decide.caption_required=false keeps {seconds:.1f} s more"]
    if reason == "too_short":
        return ["a smaller --config.decide.min_seconds keeps the longest of them"]

    lines = []
    for measure, side in REASONS.get(reason, {}).items():
        only = [row for row in alone if _beyond(row, reason, settings) == [measure]]
        values = np.array([row["measures"][measure] for row in only])
        lengths = np.array([_seconds(row) for row in only])
        for share in SHARES if len(only) else ():
            # The threshold at which this share of the seconds is on the right side.
            order = np.argsort(-values if side == BELOW else values, kind="stable")
            reached = np.cumsum(lengths[order]) >= share * lengths.sum() - 1e-9
            limit = values[order[int(np.argmax(reached))]]
            keeps = lengths[values >= limit if side == BELOW else values <= limit].sum()
            key = f"--config.decide.thresholds.{reason}.{measure}"
            lines.append(f"{key}={float(limit)} keeps {keeps:.1f} s more")
    return lines


def _beyond(row: Row, reason: str, settings: DecideSettings) -> list[str]:
    """Return the measures of a reason that are beyond their thresholds."""
    return [
        measure
        for measure, side in REASONS[reason].items()
        if is_beyond(row["measures"].get(measure), side, settings.limit(reason, measure))
    ]
