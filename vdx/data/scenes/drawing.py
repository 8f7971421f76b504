"""How the objects and backgrounds of procedural scenes are drawn.

A look is a shape, a colour and a style; a state is where it is: see `vdx.data.scenes.source`.
"""

import functools
import math
from typing import Any

import numpy as np

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FILL",
    "REACH",
    "SHAPES",
    "STYLES",
    "background",
    "draw",
    "paint",
    "still",
]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (228, 32, 40),
    "green": (40, 176, 56),
    "blue": (48, 92, 246),
    "yellow": (250, 226, 50),
    "purple": (170, 60, 222),
    "cyan": (50, 216, 226),
    "orange": (250, 132, 24),
    "white": (246, 246, 246),
}
STYLES = ("flat", "outlined", "soft")
# Two tones and the pattern that mixes them; tones stay dark so that every object stands out.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], str]] = {
    "black": ((0, 0, 0), (0, 0, 0), ""),
    "grey": ((74, 74, 78), (74, 74, 78), ""),
    "dark blue": ((16, 22, 64), (16, 22, 64), ""),
    "brown": ((60, 40, 28), (60, 40, 28), ""),
    "stripes": ((22, 26, 34), (54, 60, 72), "stripes"),
    "dots": ((28, 24, 36), (70, 64, 84), "dots"),
    "checks": ((24, 30, 28), (56, 66, 62), "checks"),
}
PERIOD = 0.25  # of the background patterns
OUTLINE, FILL = 0.2, 0.55  # width of an outline in radii; brightness inside it
SOFT = 0.22  # half width of a soft edge in radii
REACH = 1.2  # no shape or style is seen farther than this many radii from its centre


def _star(x, y, points: int, outer: float, inner: float):
    """Distance to a star with its first point up: fold to one wedge, whose edge is a line."""
    sector = math.tau / points
    turns = np.arctan2(x, -y) / np.float32(sector)
    theta = np.abs(turns - np.rint(turns)) * np.float32(sector)
    rho = np.hypot(x, y)
    dx, dy = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    slope = math.atan2(-dx, dy)  # direction of the edge's outward normal
    return rho * np.cos(theta - np.float32(slope)) - outer * math.cos(slope)


def _distance(shape: str, x, y):
    """Signed distance in radii from the edge of the upright unit shape, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26
    if shape == "triangle":
        return _star(x, y, 3, 1.12, 0.56)
    if shape == "star":
        return _star(x, y, 5, 1.12, 0.5)
    x, y = np.abs(x), np.abs(y)
    far = np.maximum(x, y)
    return far - 0.84 if shape == "square" else np.maximum(far - 1.0, np.minimum(x, y) - 0.34)


def paint(shape: str, style: str, dx, dy, radius, angle=0.0):
    """Coverage and brightness, both in [0, 1], of a shape at offsets from its centre.

    dx, dy: float32 offsets in pixels, x right and y down; radius in pixels and angle in
    radians broadcast against them.
    """
    radius = np.asarray(radius, np.float32)
    if np.any(angle):
        cos, sin = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    edge = _distance(shape, dx / radius, dy / radius) * radius
    shade: Any = np.float32(1.0)
    if style == "soft":
        cover = np.clip(0.5 - edge / np.maximum(2 * SOFT * radius, 1.0), 0.0, 1.0)
        return cover * cover * (3.0 - 2.0 * cover), shade
    if style == "outlined":
        shade = FILL + (1.0 - FILL) * np.clip(0.5 + edge + OUTLINE * radius, 0.0, 1.0)
    return np.clip(0.5 - edge, 0.0, 1.0), shade


def _wave(position, pixels: float):
    """A square wave of the pattern's period in [-1, 1], its edges one pixel wide."""
    ramp = 0.25 - np.abs(position / PERIOD % 1.0 - 0.5)
    return np.clip(2.0 * ramp * PERIOD * pixels, -1.0, 1.0)


@functools.lru_cache(maxsize=64)
def still(name: str, height: int, width: int) -> np.ndarray:
    """The background [1 h w 3] of a camera at rest, drawn once."""
    return background(name, np.zeros(1), height, width)


def background(name: str, shift: np.ndarray, height: int, width: int) -> np.ndarray:
    """The background moved right by `shift` [t] widths: float32 [t h w 3] in [0, 255]."""
    dark, light, pattern = BACKGROUNDS[name]
    x = (np.arange(width) + 0.5) / width - shift[:, None, None]
    y = (np.arange(height)[:, None] + 0.5) / width  # in widths, so that patterns keep aspect
    if pattern == "dots":
        far = np.hypot(x / PERIOD % 1.0 - 0.5, y / PERIOD % 1.0 - 0.5) * PERIOD
        mix = np.clip(0.5 + (0.07 - far) * width, 0.0, 1.0)
    elif pattern == "checks":
        mix = 0.5 + 0.5 * _wave(x, width) * _wave(y, width)
    else:
        mix = np.broadcast_to(0.5 + 0.5 * _wave(x, width), (len(shift), height, width))
    low, high = np.array(dark, np.float32), np.array(light, np.float32)
    return low + mix.astype(np.float32)[..., None] * (high - low)


def draw(
    canvas: np.ndarray, shape: str, colour: str, style: str, state: dict[str, np.ndarray]
) -> None:
    """Paint one object over the canvas [t h w 3], only where it can be seen."""
    height, width = canvas.shape[1:3]
    radius = state["size"] * min(height, width)
    centre = state["center"] * (width, height)
    side = math.ceil(2 * (REACH * radius.max() + 1))
    kw, kh = min(side, width), min(side, height)
    # The window follows the object and is kept in the frame; outside, coverage is zero anyway.
    left = np.clip(np.rint(centre[:, 0] - kw / 2), 0, width - kw).astype(int)
    top = np.clip(np.rint(centre[:, 1] - kh / 2), 0, height - kh).astype(int)
    dx = (left - centre[:, 0] + 0.5)[:, None, None] + np.arange(kw)
    dy = (top - centre[:, 1] + 0.5)[:, None, None] + np.arange(kh)[:, None]
    cover, shade = paint(
        shape,
        style,
        dx.astype(np.float32),
        dy.astype(np.float32),
        radius[:, None, None],
        state["angle"][:, None, None],
    )
    paints = (cover * shade)[..., None] * np.array(COLOURS[colour], np.float32)
    keep = 1.0 - cover[..., None]
    for i, (x, y) in enumerate(zip(left.tolist(), top.tolist(), strict=True)):
        window = canvas[i, y : y + kh, x : x + kw]
        window *= keep[i]
        window += paints[i]
