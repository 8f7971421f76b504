"""The measures of footage.

To add one, write a file with a function of a Cell, and a row of MEASURES.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vdx.data.curation.blank import contrast
from vdx.data.curation.brightness import brightness
from vdx.data.curation.cell import Cell
from vdx.data.curation.static import block_change

__all__ = ["MEASURES", "Measure"]


class Measure(NamedTuple):
    """A number of each cell, and that of a clip of cells."""

    of: Callable[[Cell], float | None]  # None: cannot be measured here
    unit: str  # what 1 is, as the report shows it
    combine: Callable[[np.ndarray], float]  # numbers of the cells of a clip -> that of the clip


def _max(values: np.ndarray) -> float:
    return float(values.max())


def _median(values: np.ndarray) -> float:
    return float(np.median(values))


MEASURES: dict[str, Measure] = {
    "brightness": Measure(brightness, "levels of 255", _median),
    "contrast": Measure(contrast, "levels of 255", _median),
    "block_change": Measure(block_change, "levels of 255", _max),
}
