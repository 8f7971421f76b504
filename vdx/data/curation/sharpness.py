"""Effective resolution: how sharp edges are, and what the finest detail holds."""

import numpy as np

from vdx.data.curation.cell import Cell
from vdx.data.curation.opencv import opencv

__all__ = ["edge_width", "fine_detail", "repeated_lines", "short_side"]

WINDOW = 17  # pixels across an edge
SLOPE = 12.0  # levels a pixel, of a strong edge
FEWEST_EDGES = 50
SHARPEST = 10  # percentile of the widths: most edges are out of focus or rounded
FINE = (0.25, 0.33)  # cycles a pixel; an image enlarged twice has nothing there
COARSE = (0.08, 0.125)
NEIGHBOURS = 5  # lines; an image enlarged up to 5 times has an edge of its pixels among them
REPEATED = 0.2  # of the largest change among the neighbours; a line with less is the same again
TILE = 64  # pixels of a side, whose spectra are averaged


def short_side(cell: Cell) -> float:
    """Return the shorter side of the content of the image, in pixels."""
    return float(min(cell.content.shape))


def edge_width(cell: Cell) -> float | None:
    """Return the width of the sharpest strong edges in pixels; None if there are few.

    The range of levels over 17 pixels across an edge, over the slope of the edge.
    """
    cv2 = opencv()
    widths = []
    for image in (cell.content, cell.content.T):
        levels = np.ascontiguousarray(image, np.float32)
        slopes = np.abs(cv2.filter2D(levels, -1, np.array([[-0.5, 0, 0.5]], np.float32)))
        window = np.ones((1, WINDOW), np.uint8)
        is_peak = slopes >= cv2.dilate(slopes, np.ones((1, 3), np.uint8))
        edges = is_peak & (slopes > SLOPE)
        edges[:, : WINDOW // 2] = False
        edges[:, -(WINDOW // 2) :] = False
        ranges = cv2.dilate(levels, window) - cv2.erode(levels, window)
        widths.append(ranges[edges] / slopes[edges])
    found = np.concatenate(widths)
    if len(found) < FEWEST_EDGES:
        return None
    return float(np.percentile(found, SHARPEST))


def repeated_lines(cell: Cell) -> float | None:
    """Return the share of lines that repeat the one before: pixels made larger.

    The smaller share of columns and rows. An image enlarged k times without interpolation has
    (k - 1) / k. None for tiny images.
    """
    if min(cell.content.shape) < 4 * NEIGHBOURS:
        return None
    return min(_repeated_columns(cell.content), _repeated_columns(cell.content.T))


def _repeated_columns(image: np.ndarray) -> float:
    """Return the share of columns that change little from the one before."""
    cv2 = opencv()
    steps = np.abs(np.diff(image.astype(np.float32), axis=1)).mean(axis=0, keepdims=True)
    largest = cv2.dilate(steps, np.ones((1, NEIGHBOURS), np.uint8))
    return float((steps < REPEATED * largest).mean())


def fine_detail(cell: Cell) -> float | None:
    """Return the energy of fine detail over that of coarse detail, in decades.

    None without coarse detail. Of the tiles that have the most: sky and background have none.
    """
    image = cell.content.astype(np.float32)
    rows = image.shape[0] // TILE
    columns = image.shape[1] // TILE
    if not rows or not columns:
        return None
    blocks = image[: rows * TILE, : columns * TILE].reshape(rows, TILE, columns, TILE)
    tiles = blocks.transpose(0, 2, 1, 3).reshape(-1, TILE, TILE)
    window = np.hanning(TILE)[:, None] * np.hanning(TILE)
    tiles = (tiles - tiles.mean(axis=(1, 2), keepdims=True)) * window
    power = np.square(np.abs(np.fft.rfft2(tiles)))  # [n TILE TILE/2+1]

    radius = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE))
    fine = power[:, (radius >= FINE[0]) & (radius < FINE[1])].mean(axis=1)
    coarse = power[:, (radius >= COARSE[0]) & (radius < COARSE[1])].mean(axis=1)
    if coarse.max() < 1e3:
        return None
    return float(np.log10(max(fine.sum(), 1e-9) / coarse.sum()))
