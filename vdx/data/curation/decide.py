"""Verdicts on clips, from measures and thresholds alone: no video is opened.

Every second of every source is in exactly one row. A shot is what is between two cuts; a long one
is split into equal clips. A clip has every reason that holds, and is kept if none does.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vdx.config.build import ConfigError, nearest
from vdx.config.ranges import NonNegative, Positive
from vdx.data.curation.caption import Caption
from vdx.data.curation.duplicates import Hashed, find_duplicates
from vdx.data.curation.fingerprint import hashes_between
from vdx.data.curation.table import MEASURES

__all__ = ["REASONS", "DecideSettings", "Side", "decide"]

Row = dict[str, Any]
Side = str
ABOVE = "above"
BELOW = "below"

# Reason -> the measures that give it, and on which side of the threshold. Any of them is enough.
REASONS: dict[str, dict[str, Side]] = {
    "low_resolution": {
        "short_side": BELOW,
        "edge_width": ABOVE,
        "fine_detail": BELOW,
        "repeated_lines": ABOVE,
    },
    "compression": {"quantiser": ABOVE, "blockiness": ABOVE},
    "watermark": {"watermark_share": ABOVE},
    "text": {"text_share": ABOVE},
    "shake": {"shake": ABOVE},
    "static": {"block_change": BELOW},
    "borders": {"bar_share": ABOVE},
    "blank": {"contrast": BELOW},
}


@dataclasses.dataclass(frozen=True)
class DecideSettings:
    """`config.decide`: how shots become clips, and which clips are kept."""

    thresholds: Mapping[str, Any]  # reason -> {measure: number}; null turns a reason off
    min_seconds: Positive = 1.0  # a shorter piece is dropped: too_short
    max_seconds: Positive = 10.0  # a longer shot is split into equal clips
    cut_score: NonNegative = 0.65  # candidates of cuts below this score are no cuts
    # Share of the bits of a perceptual hash: clips that differ less are duplicates; null: not used.
    duplicate_distance: NonNegative | None = 0.2
    caption_required: bool = True  # drop clips without a caption

    def __post_init__(self) -> None:
        """Raise ConfigError for thresholds of unknown reasons or measures."""
        if self.max_seconds < 2 * self.min_seconds:
            raise ConfigError(
                f"config.decide.max_seconds = {self.max_seconds} is less than twice min_seconds = "
                f"{self.min_seconds}: the halves of a shot would be too short."
            )
        for reason, limits in self.thresholds.items():
            where = f"config.decide.thresholds.{reason}"
            if reason not in REASONS:
                raise ConfigError(
                    f"{where} is no reason.{nearest(reason, REASONS)} Known: {', '.join(REASONS)}."
                )
            for measure, value in (limits or {}).items():
                if measure not in REASONS[reason]:
                    raise ConfigError(
                        f"{where}.{measure} is no measure of this reason.Known: "
                        f"{', '.join(REASONS[reason])}."
                    )
                if value is not None and type(value) not in (int, float):
                    raise ConfigError(f"{where}.{measure} = {value!r}, expected a number or null.")

    def limit(self, reason: str, measure: str) -> float | None:
        """Return the threshold of a measure; None: turned off."""
        value = (self.thresholds.get(reason) or {}).get(measure)
        return None if value is None else float(value)


class _Piece(NamedTuple):
    """A span of a source."""

    start: float  # seconds
    end: float  # seconds, exclusive
    is_shot: bool  # False: a gradual transition, or frames that do not decode
    after_cut: bool  # measures that look back see another shot in its first cell


def decide(
    looks: Mapping[str, Mapping[str, Any]],
    captions: Mapping[str, Caption],
    settings: DecideSettings,
) -> list[Row]:
    """Return the rows of clips.jsonl, by source and start.

    looks: name of a source -> `Look.to_json()`. A source that does not decode has no rows.
    """
    rows: list[Row] = []
    clips: list[Hashed] = []
    for name in sorted(looks):
        look = looks[name]
        caption = captions.get(name, Caption())
        cells = _Cells(look)
        if not len(cells.start):
            continue
        shot = 0
        for piece in _pieces(look, cells, settings):
            shot += piece.after_cut or not piece.is_shot
            hashes = hashes_between(look.get("fingerprint") or [], piece.start, piece.end)
            clips.append(Hashed(hashes, (name, shot)))
            row = _row(name, piece, cells, caption.at(piece.start, piece.end), settings)
            if "duplicate" in look["source"]["reasons"]:
                row["reasons"].append("duplicate")
            rows.append(row)
    _mark_duplicates(rows, clips, looks, settings)
    for row in rows:
        row["verdict"] = "drop" if row["reasons"] else "keep"
    return rows


def _mark_duplicates(
    rows: Sequence[Row],
    clips: Sequence[Hashed],
    looks: Mapping[str, Mapping[str, Any]],
    settings: DecideSettings,
) -> None:
    """Give near-duplicates of better clips their reason.

    A clip that is kept is better than one that is dropped, then a larger one, then the first.
    """
    if settings.duplicate_distance is None:
        return

    def rank(number: int) -> tuple[bool, int]:
        source = looks[rows[number]["source"]]["source"]
        return bool(rows[number]["reasons"]), -source["width"] * source["height"]

    order = sorted(range(len(rows)), key=rank)
    repeated = find_duplicates([clips[n] for n in order], settings.duplicate_distance)
    for number, earlier in zip(order, repeated, strict=True):
        reasons = rows[number]["reasons"]
        if earlier is not None and "duplicate" not in reasons:
            reasons.append("duplicate")


class _Cells:
    """The cells of a source as arrays."""

    def __init__(self, look: Mapping[str, Any]) -> None:
        cells = look["cells"]
        self.start = np.array(cells["start"], float)
        self.end = np.array(cells["end"], float)
        self.measures = {
            name: np.array(cells[name], float) for name in MEASURES if name in cells
        }  # None becomes NaN
        self.boxes = look["box"]
        self.size = look["source"]["width"], look["source"]["height"]

    def of(self, piece: _Piece) -> np.ndarray:
        """Return the numbers of the cells of a piece.

        Cells inside it, if there are any; after a cut without the first, which looks back.
        """
        inside = np.flatnonzero((self.start >= piece.start - 1e-9) & (self.end <= piece.end + 1e-9))
        if piece.after_cut and len(inside) > 1:
            return inside[1:]
        if len(inside):
            return inside
        return np.flatnonzero((self.start < piece.end) & (self.end > piece.start))

    def combine(self, numbers: np.ndarray) -> dict[str, float | None]:
        """Return the measures of a clip; None where no cell has one."""
        found: dict[str, float | None] = {}
        for name, values in self.measures.items():
            known = values[numbers]
            known = known[~np.isnan(known)]
            found[name] = round(MEASURES[name].combine(known), 6) if len(known) else None
        return found

    def crop(self, numbers: np.ndarray) -> list[int] | None:
        """Return the crop box of most cells; None if that is the whole frame."""
        boxes = [tuple(self.boxes[n]) for n in numbers if n < len(self.boxes) and self.boxes[n]]
        if 2 * len(boxes) <= len(numbers):
            return None
        box = max(sorted(set(boxes)), key=boxes.count)
        return None if box == (0, 0, *self.size) else list(box)


def _pieces(look: Mapping[str, Any], cells: _Cells, settings: DecideSettings) -> list[_Piece]:
    """Return the pieces that a source is made of, without gaps."""
    duration = look["source"]["duration"]
    breaks = [  # (start, end) of what belongs to no shot; empty at a hard cut
        (cut["start"], cut["end"]) if cut["kind"] == "gradual" else (cut["time"], cut["time"])
        for cut in look["cuts"]
        if cut["score"] >= settings.cut_score
    ]
    breaks += [(start, end) for start, end in look["damage"]]
    pieces: list[_Piece] = []
    place = 0.0
    for start, end in [*sorted(breaks), (duration, duration)]:
        start = min(max(start, place), duration)
        end = min(max(end, start), duration)
        pieces += _split(place, start, cells, settings)
        if end > start:
            pieces.append(_Piece(start, end, is_shot=False, after_cut=False))
        place = end
    return pieces


def _split(start: float, end: float, cells: _Cells, settings: DecideSettings) -> list[_Piece]:
    """Return the clips of a shot, equal but for the times of its frames."""
    if end <= start:
        return []
    inner = cells.start[(cells.start > start) & (cells.start < end)]  # times of frames
    count = int(np.ceil((end - start) / settings.max_seconds - 1e-9))
    edges = np.array([start, end])
    while count > 1 and np.diff(edges).max() > settings.max_seconds + 1e-9:
        places = np.linspace(start, end, count + 1)[1:-1]
        nearest_frame = np.abs(inner[:, None] - places).argmin(axis=0) if len(inner) else []
        edges = np.unique([start, *inner[nearest_frame], end])
        if count > len(inner):  # every cell is longer than a clip may be
            break
        count += 1
    edges = edges.tolist()
    return [
        _Piece(first, last, is_shot=True, after_cut=first == start > 0)
        for first, last in itertools.pairwise(edges)
    ]


def _row(
    name: str, piece: _Piece, cells: _Cells, caption: str | None, settings: DecideSettings
) -> Row:
    """Return the row of a clip, its verdict still open."""
    numbers = cells.of(piece)
    measures = cells.combine(numbers)
    reasons = [
        reason
        for reason, sides in REASONS.items()
        if any(
            is_beyond(measures.get(measure), side, settings.limit(reason, measure))
            for measure, side in sides.items()
        )
    ]
    if not piece.is_shot or piece.end - piece.start < settings.min_seconds - 1e-6:
        reasons.append("too_short")
    if caption is None and settings.caption_required:
        reasons.append("caption_missing")
    if caption is not None and not caption.strip():
        reasons.append("caption_empty")
    return {
        "source": name,
        "start": piece.start,
        "end": piece.end,
        "verdict": "drop",
        "reasons": reasons,
        "crop": cells.crop(numbers),
        "caption": caption,
        "measures": measures,
    }


def is_beyond(value: float | None, side: Side, limit: float | None) -> bool:
    """Return whether a measure is on the wrong side of a threshold."""
    if value is None or limit is None:
        return False
    return value > limit if side == ABOVE else value < limit
