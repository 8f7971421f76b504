"""Motion measured from pixels: dense flow between two frames, and how fast a camera pans."""

import functools

import numpy as np

__all__ = ["lucas_kanade", "pan_speed", "warp"]

WINDOW = 3.0  # standard deviation of the weights of a neighbourhood, in pixels
SMOOTH = 0.7  # of the frames, which linear interpolation would otherwise favour at rest
HALVE = 1.0  # pixels over which a level is smoothed before every second pixel is left out
ROUNDS = 4  # of refinement on each level
SMALLEST = 16  # side of the coarsest level
PRIOR = 1e-3  # of the largest structure there is: plain places keep what they had
WIDEST = 0.1  # of a frame's width that a camera may pan from one frame to the next
CANDIDATES = 41  # speeds that are tried at a time
TEXTURE = 1.5  # pixels over which the background is smoothed, against noise
PLAIN = 12.0  # mean squared levels by which a wrong pan must show, or there is no texture


@functools.lru_cache
def _smoother(size: int, sigma: float) -> np.ndarray:
    """float32 [size size]: what a Gaussian makes of each place; borders are repeated."""
    reach = round(3 * sigma)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((size, size), np.float32)
    for offset, weight in zip(offsets, kernel / kernel.sum(), strict=True):
        rows = np.arange(size)
        matrix[rows, np.clip(rows + offset, 0, size - 1)] += weight  # one column of each row
    return matrix


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian over the first two axes of [h w c]."""
    h, w = x.shape[:2]
    return _smoother(w, sigma) @ np.tensordot(_smoother(h, sigma), x, 1)


def warp(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """frame [h w c] read at each pixel plus flow [h w 2], linearly, borders repeated."""
    h, w = flow.shape[:2]
    x = np.clip(np.arange(w) + flow[..., 0], 0, w - 1)
    y = np.clip(np.arange(h)[:, None] + flow[..., 1], 0, h - 1)
    left, top = np.minimum(x.astype(int), w - 2), np.minimum(y.astype(int), h - 2)
    fx, fy = (x - left)[..., None], (y - top)[..., None]
    upper = frame[top, left] * (1 - fx) + frame[top, left + 1] * fx
    lower = frame[top + 1, left] * (1 - fx) + frame[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def _refined(one: np.ndarray, two: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The flow [h w 2] that in least squares explains each neighbourhood of frame two, read where
    the given flow leads."""
    seen = warp(two, flow)
    gy, gx = np.gradient(0.5 * (one + seen), axis=(0, 1))
    # What is left to explain, plus what the flow of each pixel already does: one flow for all.
    gt = seen - one - gx * flow[..., :1] - gy * flow[..., 1:]
    products = np.stack(
        [(a * b).sum(-1) for a, b in ((gx, gx), (gx, gy), (gy, gy), (gx, gt), (gy, gt))], -1
    )
    xx, xy, yy, xt, yt = np.moveaxis(_blur(products, WINDOW), -1, 0)
    prior, near = PRIOR * (xx + yy).max() + 1e-6, _blur(flow, WINDOW)
    xx, yy, xt, yt = xx + prior, yy + prior, prior * near[..., 0] - xt, prior * near[..., 1] - yt
    return np.stack([yy * xt - xy * yt, xx * yt - xy * xt], -1) / (xx * yy - xy * xy)[..., None]


def lucas_kanade(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float32 [h w 2]: (dx, dy) in pixels from each pixel of the first frame to the second.

    first, second: uint8 [h w 3]. Iterated least squares in Gaussian neighbourhoods of all colour
    channels, from coarse to fine (Lucas and Kanade, 1981; Bouguet, 2001). Of a plain place it
    tells what moves nearby. On true scenes of 32 pixels, at the pixels of the object, the mean
    end-point error is 0.05 px for objects that go 0.6 px a frame, 0.04 px for growing ones,
    0.1 px for shrinking ones and 0.4 px for turning ones, which go 1 px; jumps of more than half
    of the object are lost. On a texture it is 0.1 px.
    """
    levels = [[first.astype(np.float32), second.astype(np.float32)]]
    while min(levels[-1][0].shape[:2]) >= 2 * SMALLEST:
        levels.append([_blur(frame, HALVE)[::2, ::2] for frame in levels[-1]])
    flow = np.zeros((*levels[-1][0].shape[:2], 2), np.float32)
    for one, two in reversed(levels):
        h, w = one.shape[:2]
        if flow.shape[:2] != (h, w):
            flow = 2 * flow.repeat(2, 0).repeat(2, 1)[:h, :w]
        one, two = _blur(one, SMOOTH), _blur(two, SMOOTH)
        # A fine pattern misleads the coarse levels; where rest fits better, begin there.
        moved, rest = (
            _blur(((seen - one) ** 2).sum(-1, keepdims=True), WINDOW)
            for seen in (warp(two, flow), two)
        )
        flow = np.where(rest < 0.9 * moved, 0.0, flow)
        for _ in range(ROUNDS):
            flow = _refined(one, two, flow)
    return flow.astype(np.float32)


def pan_speed(video: np.ndarray, fps: float, still: np.ndarray) -> float:
    """How fast the background goes right, in widths per second; NaN where it has no texture.

    video: uint8 [t h w 3]; still: bool [t h w], where it is background. One speed is taken to
    hold for the whole clip: the one at which each frame, shifted, differs least from the next.
    """
    count, _, width, _ = video.shape
    known = still[..., None].astype(np.float32)
    frames = np.stack(
        [
            _blur(np.concatenate([f * k, k], -1), TEXTURE)
            for f, k in zip(video.astype(np.float32), known, strict=True)
        ]
    )
    known = frames[..., 3:] * still[..., None]
    frames = frames[..., :3] / np.maximum(frames[..., 3:], 1e-3)
    best, reach = 0.0, WIDEST * width
    # The farther apart two frames are, the more exactly their shift tells the speed.
    for apart in (1, max(1, (count - 1) // 2)):
        steps = best + np.linspace(-reach, reach, CANDIDATES)
        costs = [_cost(frames, known, step * apart, apart) for step in steps]
        if apart == 1 and max(costs) - min(costs) < PLAIN:
            return float("nan")
        best, reach = float(steps[int(np.argmin(costs))]), 2 * reach / CANDIDATES
    return best / width * fps


def _cost(frames: np.ndarray, known: np.ndarray, shift: float, apart: int) -> float:
    """Mean squared difference of each frame [t h w 3], moved right by `shift` pixels, to the one
    `apart` later, where both show background; half of the way is gone by each, so that both are
    smoothed alike."""
    width = frames.shape[2]
    reach = min(int(np.ceil(abs(shift) / 2)) + 1, width // 2 - 1)
    x = np.arange(reach, width - reach)

    def read(a: np.ndarray, by: float) -> np.ndarray:
        left = int(np.floor(by))
        return a[:, :, x + left] * (1 - (by - left)) + a[:, :, x + left + 1] * (by - left)

    one, two = (-shift / 2, slice(None, -apart)), (shift / 2, slice(apart, None))
    weight = np.multiply(*(read(known[part], by) for by, part in (one, two)))
    gap = np.subtract(*(read(frames[part], by) for by, part in (one, two)))
    return float((gap * gap * weight).sum() / np.maximum(3 * weight.sum(), 1e-6))
