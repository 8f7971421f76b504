"""How much of one clip's structure is in another: SSIM (Wang et al. 2004)."""

import numpy as np

__all__ = ["ssim"]

WINDOW, SIGMA = 11, 1.5
K1, K2, LEVELS = 0.01, 0.03, 255.0


def ssim(one: np.ndarray, two: np.ndarray) -> float:
    """The mean over places where the window fits, channels and frames; 1 for the same clip.

    uint8 [t h w c], of 11 pixels a side or more. The window is a Gaussian of 11 x 11 pixels,
    sigma 1.5; variances are those of the window's weights. Raises ValueError.
    """
    if (
        one.shape != two.shape
        or one.dtype != np.uint8
        or two.dtype != np.uint8
        or one.ndim != 4
        or min(one.shape[1:3]) < WINDOW
    ):
        raise ValueError(
            f"SSIM compares two clips uint8 [t h w c] of at least {WINDOW} pixels a "
            f"side, not {one.dtype} {one.shape} and {two.dtype} {two.shape}."
        )
    return float(
        np.mean(
            [
                _frame(a.astype(np.float64), b.astype(np.float64))
                for a, b in zip(one, two, strict=True)
            ]
        )
    )


def _frame(a: np.ndarray, b: np.ndarray) -> float:
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    return np.mean(
        (2 * mean_a * mean_b + c1)
        * (2 * both + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )


def _blur(x: np.ndarray) -> np.ndarray:
    """[h w c] -> [h-10 w-10 c]: along rows, then along columns."""
    weights = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        x = np.lib.stride_tricks.sliding_window_view(x, WINDOW, axis) @ weights
    return x
