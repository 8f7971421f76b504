"""Letterbox and pillarbox: bars of one colour at the sides of the image."""

from typing import NamedTuple

import numpy as np

__all__ = ["Box", "content_box"]

FLAT = 8.0  # levels between the 2nd and the 98th percentile of a line of a bar
SAME = 6.0  # levels between the means of lines of a bar
STEP = 4.0  # levels by which content differs from a bar
ALONG = 0.8  # of the length of a bar, along which content begins
BLURRED = 0.03  # of a side, over which the step is blurred at most
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
    # Where there are bars on all sides, those at the sides are no part of the rows' content.
    first = _flat_rows(luma.T)
    last = width - _flat_rows(luma.T[::-1])
    if 0 < first < last < width:
        top, bottom = _bars(luma[:, first:last], grey)
        left, right = _bars(luma[top : height - bottom].T, grey.transpose(0, 2, 1))
        if min(top, bottom, left, right) > 0 and top + bottom < height and left + right < width:
            return Box(left, top, width - left - right, height - top - bottom)

    top, bottom = _bars(luma, grey)
    if top + bottom >= height:
        return None
    left, right = _bars(luma[top : height - bottom].T, grey.transpose(0, 2, 1))
    if left + right >= width:
        return None
    return Box(left, top, width - left - right, height - top - bottom)


def _bars(luma: np.ndarray, grey: np.ndarray) -> tuple[int, int]:
    """Return the number of rows of the bars at the start and at the end."""
    size = len(luma)
    first = _flat_rows(luma)
    last = _flat_rows(luma[::-1])
    if first == size:
        return size, 0
    has_first = _is_bar(luma, grey, first)
    has_last = _is_bar(luma[::-1], grey[:, ::-1], last)

    # Dark content hides where one bar ends; the other one has the same height.
    if has_first and not has_last and last >= first:
        last = first
        has_last = True
    if has_last and not has_first and first >= last:
        first = last
        has_first = True
    first *= has_first
    last *= has_last
    if size - first - last < LEAST_CONTENT * size:
        return 0, 0
    return first, last


def _flat_rows(luma: np.ndarray) -> int:
    """Return the number of rows of one colour at the start."""
    low, high = np.percentile(luma, (2, 98), axis=1)
    means = luma.mean(axis=1)
    is_flat = (high - low < FLAT) & (np.abs(means - means[0]) < SAME)
    return len(luma) if is_flat.all() else int(np.argmin(is_flat))


def _is_bar(luma: np.ndarray, grey: np.ndarray, count: int) -> bool:
    """Return whether the first `count` rows, which have one colour, are a bar."""
    if count < LEAST_BAR * len(luma):
        return False

    # Content begins all along the bar: an object on a white ground does not.
    # Encoding blurs the step over some rows.
    inner = luma[count : count + max(3, round(BLURRED * len(luma)))].astype(np.float32)
    steps = np.abs(inner - luma[:count].mean())
    step = np.percentile(steps, 100 * (1 - ALONG), axis=1).max()
    if step < max(STEP, 3 * np.ptp(luma[:count].mean(axis=1))):  # a sky is a slope
        return False

    # Nothing enters the bar in the other frames.
    small = int(count * grey.shape[1] / len(luma))
    return small < 2 or bool(np.ptp(grey[:, : small - 1].mean(axis=2)) <= SAME)
