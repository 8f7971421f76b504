"""Flicker: brightness that goes up and down from frame to frame."""

import numpy as np

from vdx.data.curation.cell import Cell
from vdx.data.curation.opencv import opencv

__all__ = ["flicker"]

BLOCK = 8  # pixels of a side
MOST_TURN = 0.5  # pixels; a pixel that turns more than the others is near an occlusion
FEWEST = 0.1  # of the blocks


def flicker(cell: Cell) -> float | None:
    """Return half the second difference of block levels along the flow, in levels.

    The two neighbours of each frame are warped to it; pixels that change their motion unlike
    the others, as at an occlusion, do not count. The median over frames; None for less than three.
    """
    values = []
    for number in range(1, len(cell.flow)):
        value = _second_difference(cell, number)
        if value is not None:
            values.append(value)
    if not values:
        return None
    return float(np.median(values))


def _second_difference(cell: Cell, number: int) -> float | None:
    """Return the flicker of a frame; None if too little of it can be followed."""
    cv2 = opencv()
    here = cell.moving[number].astype(np.float32)
    height, width = here.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)

    def warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
        warped: np.ndarray = cv2.remap(
            image, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR
        )
        return warped

    # The flow to the frame before is minus the flow from there, at the place where it ends.
    ahead = cell.flow[number]
    behind = -warp(cell.flow[number - 1], -cell.flow[number - 1])
    later = warp(cell.moving[number + 1].astype(np.float32), ahead)
    earlier = warp(cell.moving[number - 1].astype(np.float32), behind)
    turn = ahead + behind
    turn = np.hypot(*np.moveaxis(turn - np.median(turn, axis=(0, 1)), -1, 0))
    valid = (turn < MOST_TURN).astype(np.float32)

    size = (max(1, width // BLOCK), max(1, height // BLOCK))
    change = cv2.resize(valid * (earlier - 2 * here + later), size, interpolation=cv2.INTER_AREA)
    share = cv2.resize(valid, size, interpolation=cv2.INTER_AREA)
    known = share > 0.5
    if known.mean() < FEWEST:
        return None
    return float(np.abs(change[known] / share[known]).mean()) / 2
