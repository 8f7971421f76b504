"""Drawing of the objects and backgrounds of procedural scenes.

A look is a shape, a colour and a style. A state is a place, a size and an angle: see
`vdx.data.scenes.world`.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "EXTENT",
    "FILL",
    "SHAPES",
    "STYLES",
    "background",
    "draw",
    "paint",
    "still",
]

# Scalars and arrays that broadcast against each other.
Number = float | np.floating | np.ndarray

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {  # RGB levels
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
PERIOD = 0.25  # of the background patterns, in widths
DOT_RADIUS = 0.07  # of the dots of a background, in widths
OUTLINE = 0.2  # width of an outline in radii
FILL = 0.55  # brightness inside an outline
SOFT = 0.22  # half width of a soft edge in radii
EXTENT = 1.2  # no shape or style is visible farther than this many radii from its centre


def _star_distance(
    x: np.ndarray, y: np.ndarray, points: int, outer: float, inner: float
) -> np.ndarray:
    """Return the distance to a star with its first point up.

    The plane is folded to one wedge, in which the edge of the star is a line.
    """
    sector = math.tau / points
    turns = np.arctan2(x, -y) / np.float32(sector)
    theta = np.abs(turns - np.rint(turns)) * np.float32(sector)
    rho = np.hypot(x, y)

    dx = inner * math.cos(sector / 2) - outer
    dy = inner * math.sin(sector / 2)
    slope = math.atan2(-dx, dy)  # direction of the edge's outward normal
    return rho * np.cos(theta - np.float32(slope)) - outer * math.cos(slope)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance in radii from the edge of the upright unit shape.

    Negative inside. Every shape is drawn about its centroid.
    """
    # Round shapes, then stars; a triangle is a star of three points without dents.
    if shape == "circle":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74) - 0.26

    if shape == "triangle":
        return _star_distance(x, y, 3, 1.12, 0.56)
    if shape == "star":
        return _star_distance(x, y, 5, 1.12, 0.5)

    # Square and cross are symmetric about both axes.
    x = np.abs(x)
    y = np.abs(y)
    far = np.maximum(x, y)
    if shape == "square":
        return far - 0.84
    return np.maximum(far - 1.0, np.minimum(x, y) - 0.34)


def paint(
    shape: str,
    style: str,
    dx: np.ndarray,
    dy: np.ndarray,
    radius: Number,
    angle: Number = 0.0,
) -> tuple[np.ndarray, Number]:
    """Return coverage and brightness of a shape, both in [0, 1].

    dx, dy: float32 offsets from its centre in pixels, x right and y down. radius in pixels and
    angle in radians broadcast against them.
    """
    # Turn the offsets back into the coordinates of the upright shape.
    radius = np.asarray(radius, np.float32)
    if np.any(angle):
        cos = np.cos(angle, dtype=np.float32)
        sin = np.sin(angle, dtype=np.float32)
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    edge = _distance(shape, dx / radius, dy / radius) * radius  # pixels

    # Coverage changes from 1 to 0 over one pixel, or over the width of a soft edge.
    if style == "soft":
        cover = np.clip(0.5 - edge / np.maximum(2 * SOFT * radius, 1.0), 0.0, 1.0)
        return cover * cover * (3.0 - 2.0 * cover), np.float32(1.0)

    cover = np.clip(0.5 - edge, 0.0, 1.0)
    if style == "outlined":
        return cover, FILL + (1.0 - FILL) * np.clip(0.5 + edge + OUTLINE * radius, 0.0, 1.0)
    return cover, np.float32(1.0)


def _wave(position: np.ndarray, pixels: float) -> np.ndarray:
    """Return a square wave in [-1, 1] of the patterns' period, edges one pixel wide."""
    ramp = 0.25 - np.abs(position / PERIOD % 1.0 - 0.5)
    return np.clip(2.0 * ramp * PERIOD * pixels, -1.0, 1.0)


@functools.lru_cache(maxsize=64)
def still(name: str, height: int, width: int) -> np.ndarray:
    """Return the background [1 h w 3] of a camera at rest, drawn once."""
    return background(name, np.zeros(1), height, width)


def background(name: str, shift: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a background, float32 [t h w 3] in [0, 255].

    shift: [t], how far it has moved to the right, in widths.
    """
    dark, light, pattern = BACKGROUNDS[name]
    # Both in widths, so that patterns keep their aspect.
    x = (np.arange(width) + 0.5) / width - shift[:, None, None]
    y = (np.arange(height)[:, None] + 0.5) / width

    # How much of the light tone each pixel has, [t h w] in [0, 1].
    if pattern == "dots":
        far = np.hypot(x / PERIOD % 1.0 - 0.5, y / PERIOD % 1.0 - 0.5) * PERIOD
        mix = np.clip(0.5 + (DOT_RADIUS - far) * width, 0.0, 1.0)
    elif pattern == "checks":
        mix = 0.5 + 0.5 * _wave(x, width) * _wave(y, width)
    else:
        mix = np.broadcast_to(0.5 + 0.5 * _wave(x, width), (len(shift), height, width))

    low = np.array(dark, np.float32)
    high = np.array(light, np.float32)
    return low + mix.astype(np.float32)[..., None] * (high - low)


class _Window(NamedTuple):
    """The part of a frame in which an object can be seen."""

    left: np.ndarray  # int [t], first column
    top: np.ndarray  # int [t], first row
    width: int  # pixels
    height: int  # pixels


def _window(centre: np.ndarray, radius: np.ndarray, height: int, width: int) -> _Window:
    """Return the window of an object with centre [t 2] and radius [t], all in pixels.

    It follows the object and is kept in the frame; coverage outside it is zero.
    """
    side = math.ceil(2 * (EXTENT * radius.max() + 1))
    window_width = min(side, width)
    window_height = min(side, height)
    left = np.clip(np.rint(centre[:, 0] - window_width / 2), 0, width - window_width)
    top = np.clip(np.rint(centre[:, 1] - window_height / 2), 0, height - window_height)
    return _Window(left.astype(int), top.astype(int), window_width, window_height)


def draw(
    canvas: np.ndarray, shape: str, colour: str, style: str, state: Mapping[str, np.ndarray]
) -> None:
    """Paint one object over the canvas [t h w 3], only where it can be seen.

    state: "center" [t 2], "size" [t] and "angle" [t], in coordinates of the frame.
    """
    height, width = canvas.shape[1:3]
    radius = state["size"] * min(height, width)
    centre = state["center"] * (width, height)
    window = _window(centre, radius, height, width)

    # Offsets of the window's pixels from the centre of the object.
    dx = (window.left - centre[:, 0] + 0.5)[:, None, None] + np.arange(window.width)
    dy = (window.top - centre[:, 1] + 0.5)[:, None, None] + np.arange(window.height)[:, None]
    cover, shade = paint(
        shape,
        style,
        dx.astype(np.float32),
        dy.astype(np.float32),
        radius[:, None, None],
        state["angle"][:, None, None],
    )

    # Blend with what is already on the canvas.
    colours = (cover * shade)[..., None] * np.array(COLOURS[colour], np.float32)
    transparency = 1.0 - cover[..., None]
    corners = zip(window.left.tolist(), window.top.tolist(), strict=True)
    for frame, (x, y) in enumerate(corners):
        part = canvas[frame, y : y + window.height, x : x + window.width]
        part *= transparency[frame]
        part += colours[frame]
