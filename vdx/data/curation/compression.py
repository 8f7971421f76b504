"""Strong compression: by the file's own quantiser, and by the blocks that it leaves."""

import numpy as np

from vdx.data.curation.cell import Cell

__all__ = ["blockiness", "quantiser"]

BLOCK = 8  # pixels; of MPEG-1 to MPEG-4 and JPEG, and of the transforms of H.264
CLIP = 8.0  # levels; a larger second difference is an edge of the scene


def quantiser(cell: Cell) -> float | None:
    """Return the mean quantiser of the frames, 0 to 51; None for codecs other than H.264."""
    if cell.qp is None:
        return None
    return float(cell.qp.mean())


def blockiness(cell: Cell) -> float | None:
    """Return the excess of change at the edges of blocks, 0 for none.

    Clipped second differences along rows, mean of each of the 8 phases of columns; the largest
    over the mean of the others, less 1. It is 0.40 and more after damage that a later encoding
    does not hide.
    """
    levels = cell.content.astype(np.float32)
    if min(levels.shape) < 4 * BLOCK:
        return None
    # The step between columns x and x + 1, less the mean of the steps around it.
    steps = np.diff(levels, axis=1)
    excess = np.abs(steps[:, 1:-1] - (steps[:, :-2] + steps[:, 2:]) / 2)
    columns = np.minimum(excess, CLIP).mean(axis=0)
    phases = np.array([columns[phase::BLOCK].mean() for phase in range(BLOCK)])
    others = (phases.sum() - phases.max()) / (BLOCK - 1)
    if others < 0.05:
        return None
    return float(phases.max() / others) - 1
