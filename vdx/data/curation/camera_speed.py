"""Speed of the camera."""

import numpy as np

from vdx.data.curation.camera import camera_shift
from vdx.data.curation.cell import Cell
from vdx.data.curation.flow import dense_flow

__all__ = ["camera_speed"]

FAR = 0.1  # widths; beyond, too little of the first frame is left in the last one


def camera_speed(cell: Cell) -> float | None:
    """Return how fast the centre of the image moves, in image widths a second.

    The mean motion counts: shake averages out. None for a single frame, or without texture.
    """
    rate = cell.frames_a_second
    if rate is None:
        return None
    width = cell.grey.shape[2]
    known = cell.shifts[~np.isnan(cell.shifts).any(axis=1)]
    if 2 * len(known) < len(cell.shifts):
        return None
    speed = float(np.hypot(*known.mean(axis=0))) * rate / width if len(known) else 0.0

    # Slow motion is a small part of a pixel a frame, where flow is inexact.
    seconds = float(cell.times[-1] - cell.times[0])
    if speed * seconds > FAR:
        return speed
    shift = camera_shift(dense_flow(cell.grey[0], cell.grey[-1]), cell.grey[0])
    if np.isnan(shift).any():
        return speed if len(known) else None
    return float(np.hypot(*shift)) / (seconds * width)
