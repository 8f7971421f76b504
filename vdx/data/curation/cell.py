"""Half a second of footage, as the measures see it."""

import dataclasses
import functools

import numpy as np

from vdx.data.curation.borders import Box, content_box
from vdx.data.curation.camera import camera_shift
from vdx.data.curation.flow import dense_flow
from vdx.data.curation.opencv import opencv
from vdx.data.curation.text_reader import TextLine, read_text_lines

__all__ = ["Cell"]

REPEATED = 0.2  # mean change in levels, below which a frame repeats the one before


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
    audio: np.ndarray | None  # float32 [samples], mono, in [-1, 1]; None without audio
    reads_text: bool = False  # whether text is read in this cell

    @functools.cached_property
    def box(self) -> Box | None:
        """The content of the middle frame, inside its bars; None if it is blank."""
        return content_box(self.luma, self.grey)

    @functools.cached_property
    def luma(self) -> np.ndarray:
        """Grey levels of the middle frame, uint8 [H W]."""
        cv2 = opencv()
        levels: np.ndarray = cv2.cvtColor(self.frame, cv2.COLOR_RGB2GRAY)
        return levels

    @functools.cached_property
    def content(self) -> np.ndarray:
        """Grey levels of the middle frame inside its bars, uint8 [h w]."""
        if self.box is None:
            return self.luma
        return self.luma[self.box.y : self.box.y + self.box.h, self.box.x : self.box.x + self.box.w]

    @functools.cached_property
    def moving(self) -> np.ndarray:
        """Frames of `before` and the cell that differ from the one before, uint8 [n h w]."""
        frames = np.concatenate([self.before, self.grey])
        changes = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2))
        return frames[np.append(True, changes > REPEATED)]

    @functools.cached_property
    def flow(self) -> np.ndarray:
        """Flow between consecutive frames of `moving`, float32 [n-1 h w 2], pixels."""
        height, width = self.grey.shape[1:]
        flows = [dense_flow(*pair) for pair in zip(self.moving, self.moving[1:], strict=False)]
        return np.array(flows, np.float32).reshape(-1, height, width, 2)

    @functools.cached_property
    def shifts(self) -> np.ndarray:
        """Shift of the image's centre in each flow, float64 [n-1 2]; NaN without texture."""
        pairs = zip(self.flow, self.moving, strict=False)
        return np.array([camera_shift(flow, image) for flow, image in pairs]).reshape(-1, 2)

    @functools.cached_property
    def text(self) -> list[TextLine] | None:
        """The lines of text of the middle frame; None if text is not read in this cell."""
        return read_text_lines(self.frame) if self.reads_text else None

    @property
    def frames_a_second(self) -> float | None:
        """Frames that differ from the one before, a second; None for a single time."""
        if len(self.times) < 2:
            return None
        rate = (len(self.times) - 1) / float(self.times[-1] - self.times[0])
        pairs = len(self.before) + len(self.grey) - 1
        return rate * len(self.flow) / pairs
