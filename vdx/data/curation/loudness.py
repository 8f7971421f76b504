"""Loudness of the audio."""

import numpy as np

from vdx.data.curation.cell import Cell

__all__ = ["loudness"]

SILENCE = -100.0  # decibels, also of digital silence


def loudness(cell: Cell) -> float | None:
    """Return the root mean square in decibels of full scale; None without audio."""
    if cell.audio is None or not len(cell.audio):
        return None
    power = float(np.mean(np.square(cell.audio, dtype=np.float64)))
    return max(SILENCE, 10 * float(np.log10(max(power, 1e-30))))
