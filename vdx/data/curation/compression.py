"""Strong compression: the file's own quantiser, and blocks that are visible."""

import numpy as np

from vdx.data.curation.cell import Cell

__all__ = ["blockiness", "quantiser"]

BLOCK = 8  # pixels; of MPEG-1 to MPEG-4 and JPEG, and of the transforms of H.264
CLIP = 8.0  # levels; a larger second difference is an edge of the scene
FLOOR = 0.1  # levels; without it, rounding of a smooth sky would be an excess


def quantiser(cell: Cell) -> float | None:
    """Return the mean quantiser of the frames, 0 to 51; None unless it is H.264."""
    if cell.qp is None:
        return None
    return float(cell.qp.mean())


def blockiness(cell: Cell) -> float | None:
    """Return how much the edges of blocks of 8 pixels stand out; 0: not at all.

    It finds damage that a file has from an earlier encoding, such as MPEG or JPEG; H.264's own
    filter smooths the edges of its blocks. None for tiny images.
    """
    levels = cell.content.astype(np.float32)
    if min(levels.shape) < 4 * BLOCK:
        return None
    return (_excess(levels) + _excess(levels.T)) / 2


def _excess(levels: np.ndarray) -> float:
    """Return the excess of the largest of 8 phases of columns over the others.

    An edge of a block also changes the two phases next to it, which do not count. An enlarged
    image has several large phases, so its excess is small.
    """
    steps = np.diff(levels, axis=1)
    bends = np.abs(steps[:, 1:-1] - (steps[:, :-2] + steps[:, 2:]) / 2)
    columns = np.minimum(bends, CLIP).mean(axis=0)
    phases = np.array([columns[phase::BLOCK].mean() for phase in range(BLOCK)])
    largest = int(phases.argmax())
    others = np.delete(phases, [largest, (largest + 1) % BLOCK, (largest - 1) % BLOCK]).max()
    return float((phases[largest] - others) / (others + FLOOR))
