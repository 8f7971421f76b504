"""Temporal consistency: steady brightness, and the colours of the subject.

Each measure returns its value and the share of the clip that could be measured. Alone they
reward frozen clips: report them together with `vdx.data.motion.motion_score`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vdx.data.motion import LUMA
from vdx.metrics.optical_flow import lucas_kanade, warp

__all__ = ["Measurement", "flicker", "identity_drift", "lab"]

BLOCK = 8  # pixels along the blocks of which flicker is the mean, above the scale of noise
AGREE = 0.5  # pixels by which forward and backward flow may differ
BINS = (4, 8, 8)  # of L, a and b; few of L, since light may change
RANGE = ((-100.0, 100.0), (-100.0, 100.0), (-100.0, 100.0))  # of L, a and b in the histogram
LEAST_PIXELS = 12  # of a subject; fewer fill a histogram by chance
WHITE = np.array([0.95047, 1.0, 1.08883])  # XYZ of D65
# XYZ of linear sRGB (IEC 61966-2-1).
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


class Measurement(NamedTuple):
    """The value of a measure; NaN where nothing could be measured."""

    value: float
    share: float  # of the clip that could be measured


def flicker(video: np.ndarray) -> Measurement:
    """Measure flicker, in levels of luma.

    video: uint8 [t h w 3] of three frames or more. Flicker is the amount by which a frame leaves
    the mean of its neighbours, which are first warped to it: half the mean over blocks of
    |Y- - 2 Y + Y+|, where the motion is known both ways.
    """
    luma = video.astype(np.float32) @ LUMA
    pairs = list(itertools.pairwise(video))
    forward = [lucas_kanade(one, two) for one, two in pairs]  # from frame i to i + 1
    backward = [lucas_kanade(two, one) for one, two in pairs]  # from frame i + 1 to i

    # The second difference of each inner frame.
    values = []
    shares = []
    for i in range(1, len(video) - 1):
        before = _warped(luma[i - 1], backward[i - 1], forward[i - 1])
        after = _warped(luma[i + 1], forward[i], backward[i])

        # Where both neighbours are known, in blocks: noise of single pixels is no flicker.
        known = before.known & after.known
        change = _block_means(-2 * luma[i] + before.luma + after.luma, known)
        if len(change):
            values.append(0.5 * np.abs(change).mean())
        shares.append(known.mean())
    return Measurement(_mean(values, float("nan")), _mean(shares, 0.0))


class _Neighbour(NamedTuple):
    """A neighbouring frame at the places of the current one."""

    luma: np.ndarray  # [h w]
    known: np.ndarray  # bool [h w], where forward and backward flow agree


def _warped(luma: np.ndarray, there: np.ndarray, back: np.ndarray) -> _Neighbour:
    """Warp a neighbour [h w] by the flow `there` [h w 2]; `back` is the flow from it."""
    gap = np.linalg.norm(there + warp(back, there), axis=-1)
    return _Neighbour(warp(luma[..., None], there)[..., 0], gap < AGREE)


def _block_means(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Average x [h w] over the blocks of which half or more is known: [blocks]."""
    counts = _in_blocks(known).sum((1, 3))
    sums = _in_blocks(x * known).sum((1, 3))
    return (sums / np.maximum(counts, 1))[counts >= BLOCK * BLOCK / 2]


def _in_blocks(x: np.ndarray) -> np.ndarray:
    """Cut [h w] into blocks: [rows, BLOCK, columns, BLOCK]."""
    rows = x.shape[0] // BLOCK
    columns = x.shape[1] // BLOCK
    return x[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)


def _mean(values: Sequence[float], empty: float) -> float:
    return float(np.mean(values)) if values else empty


def identity_drift(video: np.ndarray, masks: np.ndarray) -> Measurement:
    """Measure how far the subject leaves its first look, from 0 to 1.

    video: uint8 [t h w 3]; masks: bool [t h w], where the subject is; frames that hardly show it
    are left out. The distance of two looks is 1 - the Bhattacharyya coefficient of their colour
    histograms in Lab, without the median of L, since light may change. The value is the mean
    distance to the first look and to the one before, half each.
    """
    looks = []
    for frame, mask in zip(video, masks, strict=True):
        if mask.sum() >= LEAST_PIXELS:
            looks.append(_histogram(frame[mask]))
    share = len(looks) / len(video)
    if len(looks) < 2:
        return Measurement(float("nan"), share)

    to_first = np.mean([_distance(looks[0], look) for look in looks[1:]])
    to_previous = np.mean([_distance(one, two) for one, two in itertools.pairwise(looks)])
    return Measurement(float(0.5 * (to_first + to_previous)), share)


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Count the Lab colours of pixels [n 3], as shares."""
    colours = lab(pixels)
    colours[:, 0] -= np.median(colours[:, 0])
    counts, _ = np.histogramdd(colours, BINS, RANGE)
    return counts / counts.sum()


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    """Return 1 - the Bhattacharyya coefficient of two histograms."""
    return 1.0 - float(np.sqrt(one * two).sum())


def lab(pixels: np.ndarray) -> np.ndarray:
    """Convert sRGB uint8 [... 3] to CIE L*a*b* (1976), white D65."""
    rgb = pixels.astype(np.float64) / 255.0
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ XYZ.T / WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
