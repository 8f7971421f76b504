"""Speed of the camera."""

import numpy as np

from vdx.data.curation.cell import Cell

__all__ = ["camera_speed"]


def camera_speed(cell: Cell) -> float | None:
    """Return how fast the centre of the image moves, in image widths a second.

    The mean motion counts: shake and noise of the flow average out. None for a single frame, or
    without texture.
    """
    rate = cell.frames_a_second
    if rate is None:
        return None
    if not len(cell.shifts):
        return 0.0
    shifts = cell.shifts[~np.isnan(cell.shifts).any(axis=1)]
    if 2 * len(shifts) < len(cell.shifts):
        return None
    return float(np.hypot(*shifts.mean(axis=0))) * rate / cell.grey.shape[2]
