"""Precision and recall of the reasons on planted faults; thresholds of configs/prepare.py."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.data.planted_faults import Planted, corpus, write
from vdx.config.loader import resolve
from vdx.data.curation.caption import Caption
from vdx.data.curation.decide import DecideSettings, decide
from vdx.data.curation.look import LookSettings, look

ROOT = Path(__file__).parents[2]


class Decided(NamedTuple):
    """A planted clip and the row that it got."""

    planted: Planted  # without its frames
    row: dict  # of clips.jsonl


class Figures(NamedTuple):
    """Of one reason."""

    precision: float
    recall: float
    planted: int
    wrong: list[str]  # clips that it missed or gave for nothing


def decided(
    seed: int,
    photos: Sequence[np.ndarray],
    rounds: int = 1,
    text: bool = False,
    kinds: Sequence[str] = (),
) -> Iterator[Decided]:
    """Yield the clips of a corpus with their longest rows."""
    config = resolve(str(ROOT / "configs" / "prepare.py"), [])
    settings = DecideSettings(**config["decide"])
    with tempfile.TemporaryDirectory() as folder:
        for planted in corpus(seed, photos, rounds, kinds):
            path = Path(folder) / "a.mp4"
            write(planted, path)
            found = look(path, LookSettings(text=text)).to_json()
            rows = decide({"a": found}, {"a": Caption("a clip")}, settings)
            planted.frames = planted.frames[:0]
            yield Decided(planted, max(rows, key=lambda row: row["end"] - row["start"]))


def figures(clips: Sequence[Decided], reason: str) -> Figures:
    """Return precision and recall of a reason."""
    has = np.array([reason in clip.planted.faults for clip in clips])
    given = np.array([reason in clip.row["reasons"] for clip in clips])
    hits = int((has & given).sum())
    wrong = [clip.planted.name for clip, bad in zip(clips, has != given, strict=True) if bad]
    return Figures(hits / max(1, given.sum()), hits / max(1, has.sum()), int(has.sum()), wrong)


def overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the intersection of two boxes [x, y, w, h] over their union."""
    low = np.maximum(first[:2], second[:2])
    high = np.minimum(np.add(first[:2], first[2:]), np.add(second[:2], second[2:]))
    shared = np.prod(np.maximum(high - low, 0))
    return float(shared / (np.prod(first[2:]) + np.prod(second[2:]) - shared))


def lowest_overlap(clips: Sequence[Decided]) -> float:
    """Return the lowest overlap of a crop box with the planted one."""
    return min(
        overlap(clip.row["crop"], clip.planted.box)
        for clip in clips
        if clip.planted.box and clip.row["crop"]
    )


def speed_error(clips: Sequence[Decided]) -> float:
    """Return the median relative error of the speed of the camera on pans."""
    pans = [clip for clip in clips if clip.planted.speed]
    found = np.array([clip.row["measures"]["camera_speed"] for clip in pans], float)
    true = np.array([clip.planted.speed for clip in pans])
    return float(np.median(np.abs(found / true - 1)))
