"""Records: clips that data sources yield and that are read at chosen instants."""

import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from vdx.text_files import check_text

__all__ = [
    "NEAR",
    "BadRecord",
    "FrameFunction",
    "Reader",
    "Record",
    "clip_interval",
    "clip_times",
    "frame_index_at",
    "frame_step",
]

ROUNDING = 1e-3  # seconds; Matroska rounds timestamps to milliseconds
NEAR = 2e-3  # relative; NTSC's rates are 1/1001 = 0.1 % below the integers that name them
MAX_DENOMINATOR = 8  # of simple ratios: 30 frames per second shown at 16 are 15/8
EVEN = 0.25  # intervals that an even frame may be off; one frame too few or too many makes it 0.5

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

    def __post_init__(self) -> None:
        """Raise BadRecord for a caption that no text encoder can read."""
        try:
            check_text(self.caption)
        except ValueError as error:
            raise BadRecord(self.key, f"not a usable caption: {error}") from None

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


def frame_step(stamps: np.ndarray, fps: float) -> Fraction | None:
    """Return how many frames the footage advances with each frame of a clip.

    stamps: presentation times of the frames in seconds, ascending. fps: of the clip.

    Footage of 23.976 frames per second counts as footage of 24, so that a clip of 24 has its
    frames in a row. A ratio of the two rates within 0.2 % (NEAR) of a fraction whose denominator is
    at most 8 is that fraction. Timestamps may be rounded on top. None for any other ratio, for a
    single frame, and for uneven footage, where a frame is more than a quarter of an interval
    off its place: there the instants decide.
    """
    if len(stamps) < 2:
        return None
    places = np.linspace(stamps[0], stamps[-1], len(stamps))
    span = float(stamps[-1] - stamps[0])
    interval = span / (len(stamps) - 1)
    if np.abs(stamps - places).max() > EVEN * interval:
        return None

    ratio = 1 / (interval * fps)
    step = Fraction(ratio).limit_denominator(MAX_DENOMINATOR)
    drift = abs(ratio - float(step)) / ratio * span  # seconds, at the end of the footage
    if not step or drift > NEAR * span + ROUNDING:
        return None
    return step


def clip_interval(stamps: np.ndarray, fps: float) -> float:
    """Return the seconds of footage between two frames of a clip at `fps`.

    They are 1 / fps, or the interval of the frames that `frame_step` finds.
    """
    step = frame_step(stamps, fps)
    if step is None:
        return 1 / fps
    return float(step) * float(stamps[-1] - stamps[0]) / (len(stamps) - 1)


def clip_times(record: Record, fps: float, num_frames: int) -> np.ndarray:
    """Return the instants float64 [t] of a clip at `fps` from the start of a record.

    Footage that is too short repeats its last frame. See `frame_step`.
    """
    times = np.arange(num_frames) / fps
    stamps = record.timestamps
    step = None if stamps is None else frame_step(stamps, fps)
    if stamps is None or step is None:
        return times
    index = np.arange(num_frames) * step.numerator // step.denominator
    return stamps[np.minimum(index, len(stamps) - 1)]
