"""Hard cuts: frames that no motion of the shot before explains.

A large change over that of its neighbourhood is a candidate. Then optical flow moves the old frame
onto the new one, now and a few frames later. Flashes, strobes and objects before the lens end, and
the old frame explains a later one; whip pans are explained as badly as the frames around them.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vdx.data.curation.opencv import opencv

__all__ = ["CutDetector", "motion_compensated_correlation"]

NEIGHBOURS = 8  # frames on each side, whose median change is that of the neighbourhood
LEAST_CHANGE = 2.5  # levels of 255; less is no cut of content that is visible
LEAST_RATIO = 2.2  # of a change to that of its neighbourhood
OLD = 5  # frames before a cut that may explain one after it
NEW = 7  # frames after it
PAIRS = 6  # of an old and a new frame are compared: those that differ least
CORRELATION = 0.45  # of a moved old frame and a new one: less is a cut, at score 0.5
OF_CONTROL = 0.75  # of the correlation of frames within the shots: less is a cut, at score 0.5
FLOOR = 0.2  # candidates of lower scores are not reported
DETAIL = 3.0  # pixels, standard deviation of the blur that high-pass images lack
FLAT = 1.0  # levels, standard deviation of high-pass images without content


class CutDetector:
    """Hard cuts of frames that are given one by one.

    Memory holds a window of frames.
    """

    def __init__(self) -> None:
        self.cuts: list[dict[str, Any]] = []
        self._frames: collections.deque[tuple[float, np.ndarray]] = collections.deque()
        self._changes: collections.deque[float] = collections.deque()  # from the frame before
        self._next = 1  # place in the window of the frame that is evaluated next

    def add(self, time: float, grey: np.ndarray) -> None:
        """Take the next frame uint8 [h w] at a time in seconds."""
        change = 0.0
        if self._frames:
            change = _change(self._frames[-1][1], grey)
        self._frames.append((time, grey))
        self._changes.append(change)
        if len(self._frames) > self._next + NEIGHBOURS:
            self._evaluate()

    def finish(self, end: float) -> None:
        """Evaluate the frames that have fewer neighbours after them."""
        while self._next < len(self._frames):
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluate one frame, and forget the oldest of the window."""
        here = self._next
        around = list(itertools.islice(self._changes, 1, None))
        around.pop(here - 1)
        usual = float(np.median(around)) if around else 0.0
        change = self._changes[here]
        if change >= max(LEAST_CHANGE, LEAST_RATIO * usual):
            score = self._score(here)
            if score >= FLOOR:
                time = self._frames[here][0]
                self.cuts.append(
                    {"time": time, "kind": "hard", "start": time, "end": time, "score": score}
                )
        if here == NEIGHBOURS:
            self._frames.popleft()
            self._changes.popleft()
        else:
            self._next += 1

    def _score(self, here: int) -> float:
        """Return the score of a cut before a frame of the window; 0.5 is the threshold."""
        frames = [grey for _, grey in self._frames]
        controls = [
            motion_compensated_correlation(frames[first], frames[first + 1])
            for first in (here - 3, here - 2, here, here + 1)
            if 0 <= first < len(frames) - 1
        ]
        limit = min([CORRELATION, *(OF_CONTROL * control for control in controls)])

        old = frames[max(here - OLD, 0) : here]
        new = frames[here : here + NEW]
        best = 0.0
        for first, second in _pairs(old, new):
            best = max(best, motion_compensated_correlation(first, second))
            if limit - best / 2 < FLOOR * CORRELATION:
                return 0.0
        return round((limit - best / 2) / CORRELATION, 4)


def _pairs(
    old: Sequence[np.ndarray], new: Sequence[np.ndarray]
) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """Return pairs of an old and a new frame: the neighbours, then the most similar.

    Of two pairs that differ as much, the one with less time between comes first.
    """
    pairs = list(itertools.product(range(len(old)), range(len(new))))
    ranks = [
        _change(old[first], new[second]) + len(old) - first + second for first, second in pairs
    ]
    nearest = [pairs[number] for number in np.argsort(ranks, kind="stable")[:PAIRS]]
    return [(old[first], new[second]) for first, second in [(len(old) - 1, 0), *nearest]]


def _change(before: np.ndarray, after: np.ndarray) -> float:
    """Return the mean absolute difference of two frames, in levels."""
    cv2 = opencv()
    return float(cv2.norm(before, after, cv2.NORM_L1)) / before.size


def motion_compensated_correlation(old: np.ndarray, new: np.ndarray) -> float:
    """Return how well motion of one frame explains another, both uint8 [h w].

    The correlation, at least 0, of the high-pass images after motion compensation; 1 if neither
    has content.
    """
    cv2 = opencv()
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST).calc(new, old, None)
    rows, columns = np.indices(new.shape, np.float32)
    moved = cv2.remap(
        old,
        columns + flow[..., 0],
        rows + flow[..., 1],
        cv2.INTER_LINEAR,
        None,
        cv2.BORDER_REPLICATE,
    )
    return correlation(moved, new)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation, at least 0, of the high-pass images of two frames."""
    first = _high_pass(first)
    second = _high_pass(second)
    power = np.vdot(first, first) / first.size, np.vdot(second, second) / second.size
    if max(power) < FLAT**2:
        return 1.0
    scale = np.sqrt((power[0] + FLAT**2 / 4) * (power[1] + FLAT**2 / 4))
    return float(max(np.vdot(first, second) / first.size / scale, 0.0))


def _high_pass(grey: np.ndarray) -> np.ndarray:
    """Return a frame as float32 without its coarse structure."""
    cv2 = opencv()
    image = grey.astype(np.float32)
    detail: np.ndarray = image - cv2.GaussianBlur(image, (0, 0), DETAIL)
    return detail
