"""Dense optical flow of small grey frames."""

import functools
from typing import Any

import numpy as np

from vdx.data.curation.opencv import opencv

__all__ = ["dense_flow"]

SMALLEST = 16  # pixels of a side; smaller frames have no flow


@functools.cache
def _dis() -> Any:
    """Return DIS: Kroeger et al., Fast optical flow using dense inverse search, 2016."""
    cv2 = opencv()
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)


def dense_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the flow between frames uint8 [h w], float32 [h w 2], pixels (x, y)."""
    if min(first.shape) < SMALLEST:
        return np.zeros((*first.shape, 2), np.float32)
    flow: np.ndarray = _dis().calc(first, second, None)
    return flow
