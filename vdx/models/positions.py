"""Positions of tokens: sinusoids, tables that are added, rotary tables."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from vdx.types import Array, Float, Int


def sinusoidal(x: Float[Array, "..."], width: int, max_period: float = 1e4) -> Array:
    """[...] -> [... width]: cosines then sines of x at geometric frequencies (Vaswani 2017)."""
    half = width // 2
    freqs = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = x.astype(jnp.float32)[..., None] * freqs
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def _over_axes(
    grid: tuple[int, int, int], width: int, rows: Callable[[int, int], np.ndarray]
) -> np.ndarray:
    """[t h w f], float64: rows(entries, features) of each axis, laid along it, side by side.

    The features are divided between the axes as in Wan: 2 * (width // 6) each for h and w, the
    rest for t.
    """
    space, tables = 2 * (width // 6), []
    for axis, features in enumerate((width - 2 * space, space, space)):
        table = rows(grid[axis], features)
        shape = [1, 1, 1, table.shape[-1]]
        shape[axis] = grid[axis]
        tables.append(np.broadcast_to(table.reshape(shape), (*grid, table.shape[-1])))
    return np.concatenate(tables, -1)


def place_table(grid: tuple[int, int, int], width: int) -> np.ndarray:
    """Cosines and sines [t h w width] of each token's place, relative to the size of the grid.

    The frequencies of an axis of n tokens run geometrically from half a period to n/4 periods
    over the whole axis.
    """

    def rows(n: int, features: int) -> np.ndarray:
        freqs = np.pi * np.geomspace(1.0, max(n / 2, 1.0), features // 2)
        angles = (np.arange(n)[:, None] + 0.5) / n * freqs
        return np.concatenate([np.cos(angles), np.sin(angles)], -1)

    out = _over_axes(grid, width, rows)
    return np.pad(out, [(0, 0)] * 3 + [(0, width - out.shape[-1])]).astype(np.float32)


def sincos_table(places: np.ndarray, width: int) -> np.ndarray:
    """[n] -> [n width], float64: sines, then cosines, at geometric frequencies (Vaswani 2017)."""
    angles = places[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def plane_table(grid: tuple[int, int], width: int, base: int) -> np.ndarray:
    """Fixed positions [h w width] of the places of a frame (Peebles & Xie 2023, DiT; Latte): the
    column in the first half of the features, the row in the second. Either axis is as long as
    `base` places, whatever the grid."""
    rows, columns = (sincos_table(np.arange(n) * base / n, width // 2) for n in grid)
    shape = (*grid, width // 2)
    return np.concatenate(
        [np.broadcast_to(columns, shape), np.broadcast_to(rows[:, None], shape)], -1
    ).astype(np.float32)


def rope_table(
    grid: tuple[int, int, int], head_width: int, theta: float = 1e4
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [t h w 1 head_width/2] of 3D rotary positions (Su et al. 2021).

    Angles are built in float64.
    """
    if head_width % 2:
        raise ValueError(f"Rotary positions need an even head width, not {head_width}.")

    def rows(n: int, features: int) -> np.ndarray:
        return np.arange(n)[:, None] * theta ** (
            -np.arange(0, features, 2, dtype=np.float64) / features
        )

    angles = _over_axes(grid, head_width, rows)[..., None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def shift_rope(
    rope: tuple[Any, Any], frames: Int[Array, ""], head_width: int, theta: float = 1e4
) -> tuple[Array, Array]:
    """A `rope_table` moved on by a traced number of frames, exact for 2**20 and more of them.

    Angles are counted in turns of 2**32: such integers wrap around as angles do, where a float32
    angle of many turns has lost its fraction.
    """
    features = head_width - 4 * (head_width // 6)  # those of time come first
    freqs = theta ** (-np.arange(0, features, 2, dtype=np.float64) / features)
    steps = np.zeros(head_width // 2, np.uint32)
    steps[: len(freqs)] = np.round(freqs / (2 * np.pi) * 2**32)
    angles = (frames.astype(jnp.uint32) * steps).astype(jnp.float32) * (2 * np.pi / 2**32)
    (cos, sin), c, s = rope, jnp.cos(angles), jnp.sin(angles)
    return cos * c - sin * s, sin * c + cos * s


def apply_rope(x: Float[Array, "b t h w n d"], rope) -> Array:
    """Rotates channel i against channel i + d/2 (half-split form), in float32."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)
