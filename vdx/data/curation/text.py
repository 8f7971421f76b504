"""Text in the image: captions, titles, signs and watermarks."""

import numpy as np

from vdx.data.curation.cell import Cell
from vdx.data.curation.text_reader import TextLine

__all__ = ["text_share", "watermark_share"]

CAPTION_TOP = 0.6  # of the height; a caption is lower
CAPTION_SIDE = 0.1  # of the width, between the middle of a caption and that of the image
STILL = 0.3  # pixels a frame of the small frames


def text_share(cell: Cell) -> float | None:
    """Return the share of the image under other text; None if no text is read."""
    return _share(cell, watermarks=False)


def watermark_share(cell: Cell) -> float | None:
    """Return the share of the image under watermarks; None if no text is read.

    A watermark is text that does not move, at no place of a caption. If nothing moves, a sign in
    the scene is one too.
    """
    return _share(cell, watermarks=True)


def _share(cell: Cell, watermarks: bool) -> float | None:
    """Return the share of the image under the text of a kind."""
    if cell.text is None:
        return None
    lines = [line for line in cell.text if _is_watermark(cell, line) == watermarks]
    return sum((line.right - line.left) * (line.bottom - line.top) for line in lines)


def _is_watermark(cell: Cell, line: TextLine) -> bool:
    """Return whether a line is a watermark."""
    aside = abs((line.left + line.right) / 2 - 0.5)
    if (line.top + line.bottom) / 2 > CAPTION_TOP and aside < CAPTION_SIDE:
        return False
    if not len(cell.flow):
        return True
    height, width = cell.grey.shape[1:]
    rows = slice(int(line.top * height), int(line.bottom * height) + 1)
    columns = slice(int(line.left * width), int(line.right * width) + 1)
    flow = np.median(cell.flow[:, rows, columns], axis=(0, 1, 2))
    return bool(np.hypot(*flow) < STILL)
