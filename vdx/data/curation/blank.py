"""Blank footage: black, white, or any one colour."""

from vdx.data.curation.cell import Cell

__all__ = ["contrast"]


def contrast(cell: Cell) -> float:
    """Return the standard deviation of the levels of a frame, mean of the frames."""
    return float(cell.grey.std(axis=(1, 2)).mean())
