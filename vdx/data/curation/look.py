"""One decode of a file: its row of sources.jsonl, and every measure of every cell.

No verdict on footage is made here; `vdx.data.curation.decide` makes it, without the video.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vdx.config.ranges import Positive
from vdx.data.containers import first_bytes, open_video
from vdx.data.curation.cell import Cell
from vdx.data.curation.cuts import CutDetector
from vdx.data.curation.dissolves import DissolveDetector
from vdx.data.curation.fingerprint import Fingerprint
from vdx.data.curation.opencv import opencv
from vdx.data.curation.soundtrack import audio_spans
from vdx.data.curation.table import MEASURES
from vdx.data.images import is_animated, open_image_file
from vdx.data.record import frame_step
from vdx.data.video_files import ANIMATION, DisplayedFrame, Footage, Opener, open_footage
from vdx.files import open_regular

__all__ = ["VERSION", "Look", "LookSettings", "dropped_source", "look"]

VERSION = 1  # of the results; a change of any measure raises it, and every file is decoded again
SMALL_WIDTH = 160  # pixels of the grey frames
MOST_DAMAGE = 16  # damaged spans, after which the rest of a file is not decoded
NOT_VIDEO = "no video stream"  # in the message of the reader


@dataclasses.dataclass(frozen=True)
class LookSettings:
    """`config.look`: what the results of `look` depend on, besides the file."""

    cell_seconds: Positive = 0.5  # a measure is a number for each cell of this length
    text: bool = False  # read text, for watermarks and captions: the extra `text`, 0.5 s a frame
    text_seconds: Positive = 1.0  # of footage, of which one frame is read


@dataclasses.dataclass
class Look:
    """Everything that one decode of a file gives."""

    source: dict[str, Any]  # its row of sources.jsonl, without the name of the file
    # {"start": [...], "end": [...], row of MEASURES: [number or None, ...]}
    cells: dict[str, list[float | None]]
    # Candidates [{time, kind: hard|gradual, start, end, score}] above a low floor.
    cuts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    damage: list[list[float]] = dataclasses.field(default_factory=list)  # [start, end], seconds
    fingerprint: list[str] = dataclasses.field(default_factory=list)  # perceptual hash over time
    box: list[list[int] | None] = dataclasses.field(default_factory=list)  # [x, y, w, h] of a cell

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Look":
        """Return the look whose plain values these are."""
        return cls(**value)


class _Damage(list[tuple[int, int]]):
    """Spans of frames that do not decode, and what the decoder raised first."""

    error: Exception | None = None


def look(path: Path, settings: LookSettings) -> Look:
    """Return everything that is measured of a file; memory is bounded.

    A file of which a part decodes is measured there, and its verdict is "partial". One that does
    not decode at all has the verdict "drop".
    """
    with open_regular(path) as file:
        source = _source(hashlib.file_digest(file, "sha256").hexdigest())
    opener = lambda: str(path.absolute())
    try:
        footage = _open(opener, source)
        source |= _timeline(footage, opener)
    except Exception as error:  # there is no list of what decoders raise on damaged files
        return _dropped(source, error)

    found: dict[str, list[float | None]] = {"start": [], "end": []}
    found |= {name: [] for name in MEASURES}
    damage = _Damage()
    boxes: list[list[int] | None] = []
    cuts = CutDetector()
    dissolves = DissolveDetector()
    fingerprint = Fingerprint()
    audio = str(path.absolute()) if source["audio"] else None
    for cell in _cells(_decode(footage, opener, damage), footage, audio, settings):
        found["start"].append(cell.start)
        found["end"].append(cell.end)
        for name, measure in MEASURES.items():
            found[name].append(measure.of(cell))
        boxes.append(None if cell.box is None else list(cell.box))
        source["height"], source["width"] = cell.frame.shape[:2]
        for time, grey in zip(cell.times.tolist(), cell.grey, strict=True):
            for detector in (cuts, dissolves, fingerprint):
                detector.add(time, grey)
    for detector in (cuts, dissolves, fingerprint):
        detector.finish(footage.duration)

    if not found["start"]:
        return _dropped(source, damage.error)
    if damage:
        source["verdict"] = "partial"
        source["reasons"].append("damaged")
    ends = [*footage.stamps.tolist(), footage.duration]  # of frames before each
    spans = [[ends[first], ends[last]] for first, last in damage]
    found_cuts = sorted(cuts.cuts + dissolves.cuts, key=lambda cut: cut["start"])
    return Look(source, found, found_cuts, spans, fingerprint.hashes, boxes)


def dropped_source(sha256: str | None, error: Exception) -> Look:
    """Return the look of a file that cannot be read at all."""
    return _dropped(_source(sha256), error)


def _source(sha256: str | None) -> dict[str, Any]:
    """Return the row of a file of which nothing is certain yet but its bytes."""
    return {
        "verdict": "ok",
        "reasons": [],
        "cuts": [],
        "duration": 0.0,
        "frames": 0,
        "width": 0,
        "height": 0,
        "fps": 0.0,
        "variable_rate": False,
        "codec": None,
        "audio": False,
        "sha256": sha256,
    }


def _dropped(source: dict[str, Any], error: Exception | None) -> Look:
    """Return the look of a file of which nothing decodes."""
    reasons = source["reasons"] or ["unreadable"]
    if NOT_VIDEO in str(error):
        reasons = ["no_video"]
    # FFmpeg's message has the name of the file, on which nothing in the cache may depend.
    message = getattr(error, "strerror", None) or str(error)
    row = {**source, "verdict": "drop", "reasons": reasons, "error": message}
    return Look(row, {"start": [], "end": [], **{name: [] for name in MEASURES}})


def _open(opener: Opener, source: dict[str, Any]) -> Footage:
    """Return the footage of a file, of a truncated one what is there."""
    try:
        return open_footage(opener)
    except ValueError as error:
        if "truncated" not in str(error):
            raise
    source["verdict"] = "partial"
    source["reasons"].append("truncated")
    return open_footage(opener, partial=True)


def _timeline(footage: Footage, opener: Opener) -> dict[str, Any]:
    """Return the entries of the row of a file that its timeline and its header state."""
    stamps = footage.stamps
    fps = 1 / footage.duration if footage.duration else 0.0
    variable = False
    if len(stamps) > 1:
        fps = (len(stamps) - 1) / float(stamps[-1] - stamps[0])
        variable = frame_step(stamps, fps) is None
    codec, audio = _streams(opener)
    return {
        "duration": footage.duration,
        "frames": len(stamps),
        "fps": fps,
        "variable_rate": variable,
        "codec": codec,
        "audio": audio,
    }


def _streams(opener: Opener) -> tuple[str, bool]:
    """Return the codec of the video, and whether there is audio."""
    if ANIMATION.match(first_bytes(opener())):
        with open_image_file(opener()) as image:
            if image.format != "GIF" and not is_animated(image):
                raise ValueError(f"{NOT_VIDEO}: a still image")
            return str(image.format).lower(), False
    container, stream = open_video(opener())
    with container:
        return stream.codec_context.codec.canonical_name, bool(container.streams.audio)


def _decode(footage: Footage, opener: Opener, damage: _Damage) -> Iterator[DisplayedFrame]:
    """Yield the frames that decode, in display order.

    The others are appended to `damage`.
    """
    number = 0
    shape: tuple[int, ...] = ()
    while number < len(footage.stamps):
        try:
            for frame in footage.all_frames(opener, number):
                shape = shape or frame.pixels.shape
                if frame.pixels.shape != shape:
                    raise ValueError(f"the frames change size: {shape} then {frame.pixels.shape}")
                yield frame
                number = frame.number + 1
        except Exception as error:  # there is no list of what decoders raise on damaged files
            later = footage.starts[footage.starts > number]
            resumed = len(footage.stamps)
            if len(later) and len(damage) < MOST_DAMAGE:
                resumed = int(later[0])
            damage.append((number, resumed))
            damage.error = damage.error or error
            number = resumed


def _cells(
    frames: Iterator[DisplayedFrame],
    footage: Footage,
    audio: str | None,
    settings: LookSettings,
) -> Iterator[Cell]:
    """Yield the cells of footage. audio: the file, if it has any.

    Memory holds the small frames of one cell, and two large frames.
    """
    stamps = footage.stamps
    numbers = np.floor(stamps / settings.cell_seconds + 1e-6).astype(int)
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))  # the first frame of each cell
    stops = np.append(starts[1:], len(stamps))
    ends = np.append(stamps[starts[1:]], footage.duration)
    cell_of = np.searchsorted(starts, np.arange(len(stamps)), side="right") - 1

    before = None
    anchor = None
    spans: list[tuple[float, float]] = []  # of the cell at hand
    sounds = audio_spans(audio, footage.origin, iter(spans.pop, None)) if audio else None
    every = max(1, round(settings.text_seconds / settings.cell_seconds))
    for index, group in itertools.groupby(frames, key=lambda frame: cell_of[frame.number]):
        displayed = []
        grey = []
        quantisers = []
        native = None
        for frame in group:
            if native is None or frame.number <= (starts[index] + stops[index]) // 2:
                native = frame.pixels
            displayed.append(frame.number)
            grey.append(_small(frame.pixels))
            quantisers.append(frame.quantiser)

        assert native is not None
        stack = np.stack(grey)
        start = float(stamps[displayed[0]])
        end = float(ends[index])
        spans.append((start, end))
        yield Cell(
            start=start,
            end=end,
            times=stamps[displayed],
            grey=stack,
            before=stack[:0] if before is None else before,
            frame=native,
            anchor=anchor,
            qp=None if None in quantisers else np.array(quantisers, np.float32),
            audio=None if sounds is None else next(sounds),
            reads_text=settings.text and index % every == every // 2,
        )
        before = stack[-2:]
        anchor = stack[0]


def _small(pixels: np.ndarray) -> np.ndarray:
    """Return the grey levels of a frame uint8 [h w 3], SMALL_WIDTH wide."""
    cv2 = opencv()
    height, width = pixels.shape[:2]
    size = (SMALL_WIDTH, max(1, round(SMALL_WIDTH * height / width)))
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small: np.ndarray = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return small
