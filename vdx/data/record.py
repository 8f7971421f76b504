"""Records: clips that data sources yield and that are read at chosen instants."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["BadRecord", "FrameFunction", "Reader", "Record", "frame_index_at"]

ROUNDING = 1e-3  # seconds; Matroska rounds timestamps to milliseconds

# read(times float64 [t], in seconds) -> array; of frames, uint8 [t h w 3]
Reader = Callable[[np.ndarray], np.ndarray]
# A function of one frame uint8 [h w 3], for example its resizing.
FrameFunction = Callable[[np.ndarray], np.ndarray]


class BadRecord(ValueError):
    """One record that cannot be used; the pipeline counts, names and replaces it."""

    def __init__(self, key: str, reason: str) -> None:
        """Store the key of the record and the reason."""
        super().__init__(key, reason)  # both, so that it survives pickling between processes
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        """Return "key: reason"."""
        return f"{self.key}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Record:
    """A clip, not yet decoded."""

    key: str  # name of the record, for example "scenes/train/0/123"
    caption: str  # text that describes the clip; "" if there is none
    duration: float  # seconds; instants in [0, duration) may be read
    # float64 [frames], presentation time of every frame in seconds, ascending. None if any
    # instant may be read (a procedural source).
    timestamps: np.ndarray | None
    read: Reader  # frames at instants
    # Anything else that is known about the clip, for metrics and filters.
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Control signals by name, read at the same instants; `vdx.data.signals` lists the formats.
    tracks: Mapping[str, Reader] = dataclasses.field(default_factory=dict)
    # read_each(times, each): `each(frame)` of the frames at instants, stacked. A source of large
    # frames has only one of them in memory at a time. None: `read`, then `each`.
    read_each: Callable[[np.ndarray, FrameFunction], np.ndarray] | None = None

    def read_frames(self, times: np.ndarray, each: FrameFunction) -> np.ndarray:
        """Return `each(frame)` of the frames at instants [t], stacked."""
        if self.read_each is not None:
            return self.read_each(times, each)
        return np.stack([each(frame) for frame in self.read(times)])


def frame_index_at(stamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the index int [t] of the frame that is on the screen at each instant.

    stamps: presentation times of the frames in seconds, ascending. times: [t], in seconds. An
    instant before the first frame gives frame 0.
    """
    index = np.searchsorted(stamps, np.asarray(times) + ROUNDING, side="right") - 1
    return np.maximum(index, 0)
