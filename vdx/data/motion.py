"""Strength of motion of a clip, the same for footage and for generated clips."""

import numpy as np

__all__ = ["LUMA", "motion_score"]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def motion_score(video: np.ndarray, fps: float) -> float:
    """Return 100 times the mean absolute change of grey levels in [0, 1] in a second.

    video: uint8 [t h w 3]. The same motion at another frame rate gives about the same score.
    Noise counts as motion; one frame gives 0. Raises ValueError for another dtype or shape.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise ValueError(
            f"motion_score takes uint8 [t h w 3], not {video.dtype} {list(video.shape)}."
        )
    if len(video) == 1:
        return 0.0
    grey = video.astype(np.float32) @ LUMA / np.float32(255.0)  # [t h w]
    change = np.abs(np.diff(grey, axis=0)).mean()  # in one frame
    return float(100.0 * fps * change)
