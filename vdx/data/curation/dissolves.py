"""Gradual transitions: frames that are a blend of an earlier and a later frame.

A frame m between a and b is explained by the blend a + k (b - a) with the least squared error. In
a dissolve or a fade the blend explains most of the difference to either; in motion it does not.
"""

import collections
from typing import Any, NamedTuple

import numpy as np

from vdx.data.curation.cuts import motion_compensated_correlation
from vdx.data.curation.opencv import opencv

__all__ = ["DissolveDetector"]

SPANS = (4, 7, 10, 14, 20)  # frames from the blend to the frame before, and to the one after
WINDOW = max(SPANS)
MOST_FPS = 32.0  # of faster footage frames are left out
WIDTH = 20  # pixels of the frames that are blended: finer content moves too far
BLENDS = (0.2, 0.8)  # k of a blend
UNLIKE = 0.35  # correlation of the frames at both ends, after motion compensation: at most
FADED = 0.2  # contrast, of that of the other end; less is a fade
SHARE = 0.6  # explained by the blend, at score 0.5
FLOOR = 0.4  # candidates of lower scores are not reported
LEAST_FRAMES = 2  # from a quarter of the blend to three quarters; a flash is shorter
LEAST_CHANGE = 6.0  # levels, root of the mean squared difference of both ends
MARGIN = 1.1  # of the length: the first and the last mixed frames are hardly mixed
GAP = 0.25  # seconds; closer ones are one transition: out to black, and in from it


class _Frame(NamedTuple):
    time: float  # seconds
    grey: np.ndarray  # uint8 [h w]
    coarse: np.ndarray  # float32 [h w], flat, WIDTH wide


class _Hit(NamedTuple):
    """A blend."""

    score: float
    start: float  # seconds, of the transition
    end: float
    number: int  # of the frame


class DissolveDetector:
    """Gradual transitions of frames that are given one by one.

    Memory holds a window of frames.
    """

    def __init__(self) -> None:
        self.cuts: list[dict[str, Any]] = []
        self._frames: collections.deque[_Frame] = collections.deque(maxlen=2 * WINDOW + 1)
        self._number = 0
        self._best: _Hit | None = None
        self._last = 0  # number of the last hit

    def add(self, time: float, grey: np.ndarray) -> None:
        """Take the next frame uint8 [h w] at a time in seconds."""
        if self._frames and time - self._frames[-1].time < 1 / MOST_FPS:
            return
        self._frames.append(_Frame(time, grey, _coarse(grey)))
        self._number += 1
        self._evaluate(len(self._frames) - 1 - WINDOW)

    def finish(self, end: float) -> None:
        """Evaluate the frames that have few others after them."""
        for place in range(max(len(self._frames) - WINDOW, 0), len(self._frames)):
            self._number += 1
            self._evaluate(place)
        self._close()

    def _evaluate(self, place: int) -> None:
        """Evaluate the frame at a place of the window."""
        if self._best is not None and self._number - self._last > SPANS[0]:
            self._close()
        for span in SPANS:
            if place - span < 0 or place + span >= len(self._frames):
                return
            hit = self._blend(place, span)
            if hit is None:
                continue
            if self._best is not None and not _overlap(self._best, hit):
                self._close()
            self._last = self._number
            self._best = hit

    def _blend(self, place: int, span: int) -> _Hit | None:
        """Return the blend that a frame is of those `span` before and after it."""
        first = self._frames[place - span]
        last = self._frames[place + span]
        middle = self._frames[place].coarse - first.coarse
        whole = last.coarse - first.coarse
        power = float(whole @ whole)
        if power < LEAST_CHANGE**2 * whole.size:
            return None
        share = float(middle @ whole) / power
        if not BLENDS[0] < share < BLENDS[1]:
            return None

        # The frames from a quarter to three quarters of the blend.
        window = list(self._frames)[place - span : place + span + 1]
        shares = np.array([(frame.coarse - first.coarse) @ whole for frame in window]) / power
        quarter = int(np.argmax(shares > 0.25))
        rest = int(np.argmax(shares > 0.75))
        if rest - quarter < LEAST_FRAMES or np.diff(shares[quarter : rest + 1]).min() < 0:
            return None
        scores = [
            _score(frame.coarse - first.coarse, whole, power) for frame in window[quarter:rest]
        ]
        score = float(np.mean(scores))
        half = (window[rest].time + window[quarter].time) / 2
        length = MARGIN * (window[rest].time - window[quarter].time)
        start = self._nearest(half - length)
        end = self._nearest(half + length)

        hit = _Hit(round(score, 4), start, end, self._number)
        if score < FLOOR or self._is_known(hit) or not _is_unlike(first.grey, last.grey):
            return None
        return hit

    def _nearest(self, time: float) -> float:
        """Return the time of the frame of the window that is the nearest to a time."""
        return min((frame.time for frame in self._frames), key=lambda own: abs(own - time))

    def _is_known(self, hit: _Hit) -> bool:
        """Return whether a better blend at the same time is known."""
        best = self._best
        return best is not None and _overlap(best, hit) and best.score >= hit.score

    def _close(self) -> None:
        """Report the best of the blends that follow one another."""
        best = self._best
        self._best = None
        if best is None:
            return
        cut: dict[str, Any] = {
            "time": (best.start + best.end) / 2,
            "kind": "gradual",
            "start": best.start,
            "end": best.end,
            "score": best.score,
        }
        if self.cuts and cut["start"] - self.cuts[-1]["end"] < GAP:
            before = self.cuts.pop()
            cut["start"] = min(before["start"], cut["start"])
            cut["end"] = max(before["end"], cut["end"])
            cut["time"] = (cut["start"] + cut["end"]) / 2
            cut["score"] = max(before["score"], cut["score"])
        self.cuts.append(cut)


def _is_unlike(first: np.ndarray, last: np.ndarray) -> bool:
    """Return whether motion does not lead from one end of a blend to the other.

    Black is unlike every image.
    """
    contrasts = sorted((float(first.std()), float(last.std())))
    return (
        contrasts[0] < FADED * contrasts[1] or motion_compensated_correlation(first, last) < UNLIKE
    )


def _overlap(first: _Hit, second: _Hit) -> bool:
    """Return whether two blends share more than an instant."""
    return min(first.end, second.end) - max(first.start, second.start) > 1e-6


def _score(middle: np.ndarray, whole: np.ndarray, power: float) -> float:
    """Return the score of a blend: 0.5 where it explains SHARE of the difference.

    The smaller difference counts of those to either end.
    """
    total = float(middle @ middle)
    along = float(middle @ whole)
    left = total - along**2 / power
    to_last = total - 2 * along + power
    return 1 - left / min(total, to_last) / (1 - SHARE) / 2


def _coarse(grey: np.ndarray) -> np.ndarray:
    """Return a frame uint8 [h w] as float32, flat, WIDTH wide."""
    cv2 = opencv()
    height = max(1, round(WIDTH * grey.shape[0] / grey.shape[1]))
    small = cv2.resize(grey, (WIDTH, height), interpolation=cv2.INTER_AREA)
    flat: np.ndarray = small.astype(np.float32).ravel()
    return flat
