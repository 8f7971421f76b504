"""Letterbox and pillarbox: bars of one colour at the sides of the image."""

from typing import NamedTuple

import numpy as np

__all__ = ["Box", "content_box"]

FLAT = 8.0  # levels between the 2nd and the 98th percentile of a line of a bar
SAME = 6.0  # levels between the means of lines of a bar
STEP = 8.0  # levels by which the first lines inside differ, on the mean of their pixels
LEAST_BAR = 0.01  # of a side; what is thinner is the edge of a scan
LEAST_CONTENT = 0.25  # of a side; less is a title on one colour


class Box(NamedTuple):
    """A rectangle of an image in pixels."""

    x: int
    y: int
    w: int
    h: int


def content_box(luma: np.ndarray, grey: np.ndarray) -> Box | None:
    """Return what is inside the bars; None for an image of one colour.

    luma: uint8 [H W], a frame. grey: uint8 [t h w], small frames around it: a bar is one in all of
    them, which a dark sky above a moving camera is not.
    """
    height, width = luma.shape
    top, bottom = _bars(luma, grey)
    if top + bottom >= height:
        return None
    inside = luma[top : height - bottom]
    left, right = _bars(inside.T, grey.transpose(0, 2, 1))
    if left + right >= width:
        return None
    return Box(left, top, width - left - right, height - top - bottom)


def _bars(luma: np.ndarray, grey: np.ndarray) -> tuple[int, int]:
    """Return the number of rows of the bars at the start and at the end."""
    first = _bar(luma, grey)
    last = _bar(luma[::-1], grey[:, ::-1])
    size = len(luma)
    if first + last >= size:
        return size, 0
    if size - first - last < LEAST_CONTENT * size:
        return 0, 0
    return first, last


def _bar(luma: np.ndarray, grey: np.ndarray) -> int:
    """Return the number of rows of a bar at the start; all for one colour."""
    low, high = np.percentile(luma, (2, 98), axis=1)
    means = luma.mean(axis=1)
    is_flat = (high - low < FLAT) & (np.abs(means - means[0]) < SAME)
    count = len(luma) if is_flat.all() else int(np.argmin(is_flat))
    if count == len(luma) or count < LEAST_BAR * len(luma):
        return count if count == len(luma) else 0

    # Content begins with a step, and never enters the bar.
    inner = luma[count : count + 3].astype(np.float32)
    if np.abs(inner - means[:count].mean()).mean() < STEP:
        return 0
    small = int(count * grey.shape[1] / len(luma))
    if small > 1 and np.ptp(grey[:, : small - 1].mean(axis=2)) > SAME:
        return 0
    return count
