"""Strength of all motion: of the camera and of objects."""

import numpy as np

from vdx.data.curation.cell import Cell

__all__ = ["flow_strength"]


def flow_strength(cell: Cell) -> float | None:
    """Return the mean length of the optical flow, in image widths a second.

    The median of the frames. None for a single frame.
    """
    rate = cell.frames_a_second
    if rate is None:
        return None
    if not len(cell.flow):
        return 0.0
    lengths = np.hypot(cell.flow[..., 0], cell.flow[..., 1]).mean(axis=(1, 2))
    return float(np.median(lengths)) * rate / cell.grey.shape[2]
