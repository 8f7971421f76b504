"""Half a second of footage, as the measures see it."""

import dataclasses

import numpy as np

__all__ = ["Cell"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """About half a second of one source; cells tile it without gaps.

    What several measures need is a cached property, computed at most once.
    """

    start: float  # seconds from the first frame shown
    end: float  # seconds, exclusive: the time of the next cell's first frame
    times: np.ndarray  # float64 [t], times of the frames in seconds
    grey: np.ndarray  # uint8 [t h w], all frames, SMALL_WIDTH wide
    before: np.ndarray  # uint8 [k h w], the last frames before the cell, at most 2
    frame: np.ndarray  # uint8 [H W 3], the middle frame, upright, native size
    anchor: np.ndarray | None  # uint8 [h w], about half a second before the first frame
    qp: np.ndarray | None  # float32 [t], mean quantiser of each frame; H.264 only
    audio: np.ndarray | None  # float32 [samples], mono
