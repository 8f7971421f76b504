"""Structural similarity of two clips: SSIM (Wang et al. 2004)."""

import numpy as np

__all__ = ["ssim"]

WINDOW = 11  # pixels along the window's side, as in the paper
SIGMA = 1.5  # pixels, standard deviation of the window's weights, as in the paper
K1 = 0.01  # stabilizes the comparison of means, as in the paper
K2 = 0.03  # stabilizes the comparison of variances, as in the paper
LEVELS = 255.0  # range of the pixels


def ssim(one: np.ndarray, two: np.ndarray) -> float:
    """Compute the mean SSIM of two clips uint8 [t h w c]; 1 for equal clips.

    The mean is over frames, channels and the places where the window fits, so that a side has 11
    pixels or more. Variances use the weights of the window. Raises ValueError.
    """
    fits = one.ndim == 4 and min(one.shape[1:3]) >= WINDOW
    if not fits or one.shape != two.shape or one.dtype != np.uint8 or two.dtype != np.uint8:
        raise ValueError(
            f"SSIM compares two clips uint8 [t h w c] of at least {WINDOW} pixels a "
            f"side, not {one.dtype} {one.shape} and {two.dtype} {two.shape}."
        )
    frames = []
    for a, b in zip(one, two, strict=True):
        frames.append(_frame_ssim(a.astype(np.float64), b.astype(np.float64)))
    return float(np.mean(frames))


def _frame_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the mean SSIM of two frames float64 [h w c]."""
    mean_a = _blur(a)
    mean_b = _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b

    c1 = (K1 * LEVELS) ** 2
    c2 = (K2 * LEVELS) ** 2
    similarity = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    )
    return np.mean(similarity)


def _blur(x: np.ndarray) -> np.ndarray:
    """Average [h w c] under the window, along rows and columns: [h-10 w-10 c]."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis) @ weights
    return x
