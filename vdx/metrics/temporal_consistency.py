"""What should not change from frame to frame: brightness where nothing happens, and the subject.

Each measure gives (value, share of the clip that could be judged). Alone they reward frozen
clips: read them beside `vdx.data.motion.motion_score`.
"""

import itertools

import numpy as np

from vdx.data.motion import LUMA
from vdx.metrics.optical_flow import lucas_kanade, warp

__all__ = ["flicker", "identity_drift", "lab"]

SIDE = 8  # pixels of the blocks over which flicker is judged
AGREE = 0.5  # pixels by which forward and backward flow may differ
BINS = (4, 8, 8)  # of L, a and b
RANGE = ((-100.0, 100.0), (-100.0, 100.0), (-100.0, 100.0))
WHITE = np.array([0.95047, 1.0, 1.08883])  # D65
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)  # of linear sRGB (IEC 61966-2-1)
LEAST = 12  # pixels of a subject that can be judged


def flicker(video: np.ndarray) -> tuple[float, float]:
    """Levels of luma by which a frame leaves the mean of its neighbours, which are first moved to
    where it has them: half the mean over blocks of |Y- - 2 Y + Y+|, where the motion is known both
    ways. video: uint8 [t h w 3] of three frames or more."""
    luma = video.astype(np.float32) @ LUMA
    pairs = list(itertools.pairwise(video))
    ahead = [lucas_kanade(one, two) for one, two in pairs]  # from frame i to i + 1
    behind = [lucas_kanade(two, one) for one, two in pairs]  # and from i + 1 to i
    values, shares = [], []
    for i in range(1, len(video) - 1):
        total, known = -2 * luma[i], np.ones(luma.shape[1:], bool)
        for other, there, back in (
            (luma[i - 1], behind[i - 1], ahead[i - 1]),
            (luma[i + 1], ahead[i], behind[i]),
        ):
            total = total + warp(other[..., None], there)[..., 0]
            known &= np.linalg.norm(there + warp(back, there), axis=-1) < AGREE
        change = _blocks(total, known)
        if len(change):
            values.append(0.5 * np.abs(change).mean())
        shares.append(known.mean())
    return (
        float(np.mean(values)) if values else float("nan"),
        float(np.mean(shares)) if shares else 0.0,
    )


def _blocks(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The means of x [h w] over blocks, where half of one or more is known."""
    h, w = (n // SIDE * SIDE for n in x.shape)
    cut = lambda a: a[:h, :w].reshape(h // SIDE, SIDE, w // SIDE, SIDE)
    count = cut(known).sum((1, 3))
    return (cut(x * known).sum((1, 3)) / np.maximum(count, 1))[count >= SIDE * SIDE / 2]


def lab(pixels: np.ndarray) -> np.ndarray:
    """sRGB uint8 [... 3] as CIE L*a*b* (1976), white D65."""
    rgb = pixels.astype(np.float64) / 255.0
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ XYZ.T / WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def identity_drift(video: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    """How unlike its first look the subject becomes, 0 to 1: 1 - the Bhattacharyya coefficient of
    colour histograms in Lab, the median of L removed (light may change), half to the first frame
    and half to the one before. video: uint8 [t h w 3]; masks: bool [t h w], where the subject is;
    frames that hardly show it are left out."""
    looks = [
        _histogram(frame[mask])
        for frame, mask in zip(video, masks, strict=True)
        if mask.sum() >= LEAST
    ]
    if len(looks) < 2:
        return float("nan"), len(looks) / len(video)
    unlike = lambda one, two: 1.0 - float(np.sqrt(one * two).sum())
    first = np.mean([unlike(looks[0], look) for look in looks[1:]])
    before = np.mean([unlike(one, two) for one, two in itertools.pairwise(looks)])
    return float(0.5 * (first + before)), len(looks) / len(video)


def _histogram(pixels: np.ndarray) -> np.ndarray:
    colours = lab(pixels)
    colours[:, 0] -= np.median(colours[:, 0])
    counts, _ = np.histogramdd(colours, BINS, RANGE)
    return counts / counts.sum()
