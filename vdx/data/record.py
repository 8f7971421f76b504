"""What every data source yields: one clip that can be read at chosen instants."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["BadRecord", "Record", "frame_index_at"]

ROUNDING = 1e-3  # seconds; Matroska rounds timestamps to milliseconds


class BadRecord(ValueError):
    """One record that cannot be used; the pipeline counts, names and replaces it."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)  # both, so that it survives pickling between processes
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Record:
    """A clip, not yet decoded.

    key: names the record, for example "scenes/train/0/123".
    caption: what the clip shows; "" where nobody said.
    duration: seconds; instants in [0, duration) may be read.
    timestamps: float64 [frames], the presentation time in seconds of every frame, or None
        where any instant may be read (a procedural source).
    read: `read(times)` with times float64 [t] in seconds gives uint8 [t h w 3].
    attributes: anything else that is known about the clip, for metrics and filters.
    tracks: what else runs beside the frames, by name; `tracks[name](times)` reads it at the same
        instants. `vdx.data.signals` says which names there are and what each gives.
    """

    key: str
    caption: str
    duration: float
    timestamps: np.ndarray | None
    read: Callable[[np.ndarray], np.ndarray]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tracks: Mapping[str, Callable[[np.ndarray], np.ndarray]] = dataclasses.field(
        default_factory=dict
    )


def frame_index_at(stamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """int [t]: the frame, of those with the timestamps, that is on the screen at each instant."""
    return np.maximum(np.searchsorted(stamps, np.asarray(times) + ROUNDING, side="right") - 1, 0)
