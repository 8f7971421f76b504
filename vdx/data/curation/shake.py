"""Shake of the camera."""

import numpy as np

from vdx.data.curation.cell import Cell

__all__ = ["shake"]


def shake(cell: Cell) -> float | None:
    """Return the median change of the camera's motion, in thousandths of the width.

    The median of the absolute second differences of its path: a whip pan or a strobe changes few
    of them. None for less than three frames, or without texture.
    """
    if len(cell.times) < 2:
        return None
    if not len(cell.flow):
        return 0.0
    changes = np.diff(cell.shifts, axis=0)
    changes = np.hypot(*changes[~np.isnan(changes).any(axis=1)].T)
    if not len(changes):
        return None
    return 1000 * float(np.median(changes)) / cell.grey.shape[2]
