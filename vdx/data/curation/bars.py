"""Share of the image that bars cover."""

from vdx.data.curation.cell import Cell

__all__ = ["bar_share"]


def bar_share(cell: Cell) -> float | None:
    """Return the share of the image outside its content; None if it is blank."""
    if cell.box is None:
        return None
    height, width = cell.luma.shape
    return 1 - cell.box.w * cell.box.h / (width * height)
