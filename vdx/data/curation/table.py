"""The measures of footage.

To add one, write a file with a function of a Cell, and a row of MEASURES.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vdx.data.curation.bars import bar_share
from vdx.data.curation.blank import contrast
from vdx.data.curation.brightness import brightness
from vdx.data.curation.camera_speed import camera_speed
from vdx.data.curation.cell import Cell
from vdx.data.curation.compression import blockiness, quantiser
from vdx.data.curation.flicker import flicker
from vdx.data.curation.flow_strength import flow_strength
from vdx.data.curation.loudness import loudness
from vdx.data.curation.shake import shake
from vdx.data.curation.sharpness import edge_width, fine_detail, repeated_lines, short_side
from vdx.data.curation.static import block_change
from vdx.data.curation.text import text_share, watermark_share

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


def _min(values: np.ndarray) -> float:
    return float(values.min())


# Motion blurs some frames, so the sharpest cell is that of the clip.
MEASURES: dict[str, Measure] = {
    "short_side": Measure(short_side, "pixels", _min),
    "edge_width": Measure(edge_width, "pixels", _min),
    "fine_detail": Measure(fine_detail, "decades", _max),
    "repeated_lines": Measure(repeated_lines, "share of the lines", _min),
    "quantiser": Measure(quantiser, "0 to 51", _median),
    "blockiness": Measure(blockiness, "excess", _median),
    "bar_share": Measure(bar_share, "share of the image", _median),
    "contrast": Measure(contrast, "levels of 255", _median),
    "brightness": Measure(brightness, "levels of 255", _median),
    "flicker": Measure(flicker, "levels of 255", _median),
    "block_change": Measure(block_change, "levels of 255", _max),
    "flow_strength": Measure(flow_strength, "image widths a second", _median),
    "camera_speed": Measure(camera_speed, "image widths a second", _median),
    "shake": Measure(shake, "thousandths of the width", _median),
    "text_share": Measure(text_share, "share of the image", _median),
    "watermark_share": Measure(watermark_share, "share of the image", _median),
    "loudness": Measure(loudness, "decibels of full scale", _median),
}
