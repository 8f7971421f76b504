"""Brightness of a frame."""

from vdx.data.curation.cell import Cell

__all__ = ["brightness"]


def brightness(cell: Cell) -> float:
    """Return the mean grey level, 0 (black) to 255 (white)."""
    return float(cell.grey.mean())
