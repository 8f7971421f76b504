"""Footage in which nothing moves."""

import numpy as np

from vdx.data.curation.cell import Cell

__all__ = ["block_change"]

BLOCKS = (12, 20)  # rows and columns


def block_change(cell: Cell) -> float | None:
    """Return the largest change of a block's mean level in about half a second.

    Consecutive frames do not do: slow motion changes less than noise from one to the next.
    """
    if cell.anchor is None and len(cell.grey) < 2:
        return None
    earlier = cell.grey[0]
    later = cell.grey[-1]
    if cell.anchor is not None:
        earlier = cell.anchor
        later = cell.grey[0]
    return float(np.abs(_block_means(later) - _block_means(earlier)).max())


def _block_means(grey: np.ndarray) -> np.ndarray:
    """Return the mean levels of BLOCKS of uint8 [h w], float64."""
    rows = np.array_split(grey.astype(np.float64), min(BLOCKS[0], len(grey)), axis=0)
    means = np.stack([row.mean(axis=0) for row in rows])
    columns = np.array_split(means, min(BLOCKS[1], means.shape[1]), axis=1)
    return np.stack([column.mean(axis=1) for column in columns], axis=1)
