"""Positions: sinusoids, tables that are added to tokens, and rotary tables.

Angles of tables are built in float64, because a float32 angle of many turns has lost its fraction.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from vdx.types import Array, Float, Int

Grid = tuple[int, int, int]  # tokens along t, h and w


class Rope(NamedTuple):
    """Rotary positions of a token grid [t h w 1 d/2], for heads of width d."""

    cos: Array
    sin: Array


def sinusoidal(
    x: Float[Array, "*batch"] | Int[Array, "*batch"], width: int, max_period: float = 1e4
) -> Float[Array, "*batch d"]:
    """Return cosines, then sines of x at geometric frequencies (Vaswani et al. 2017)."""
    half = width // 2
    freqs = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)

    angles = x.astype(jnp.float32)[..., None] * freqs.reshape((1,) * x.ndim + (half,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def _features_of_axes(width: int) -> Grid:
    """Divide features over t, h and w as Wan does.

    2 * (width // 6) are for h and for w, the rest for t.
    """
    space = 2 * (width // 6)
    return width - 2 * space, space, space


def _over_axes(grid: Grid, width: int, axis_table: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Concatenate one table of each axis along the features [t h w f], float64.

    `axis_table` maps the tokens n and the features of an axis to its table [n f].
    """
    tables = []
    for axis, features in enumerate(_features_of_axes(width)):
        table = axis_table(grid[axis], features)

        # Repeat the table of this axis over both others.
        shape = [1, 1, 1, table.shape[-1]]
        shape[axis] = grid[axis]
        tables.append(np.broadcast_to(table.reshape(shape), (*grid, table.shape[-1])))
    return np.concatenate(tables, -1)


def place_table(grid: Grid, width: int) -> np.ndarray:
    """Return cosines and sines [t h w width] of each token's place in the grid.

    Places are relative to the size of the grid. The frequencies of an axis of n tokens run
    geometrically from half a period to n/4 periods over the whole axis.
    """

    def axis_table(n: int, features: int) -> np.ndarray:
        freqs = np.pi * np.geomspace(1.0, max(n / 2, 1.0), features // 2)
        angles = (np.arange(n)[:, None] + 0.5) / n * freqs
        return np.concatenate([np.cos(angles), np.sin(angles)], -1)

    out = _over_axes(grid, width, axis_table)
    missing = width - out.shape[-1]  # an odd share of features leaves one over
    return np.pad(out, [(0, 0)] * 3 + [(0, missing)]).astype(np.float32)


def sincos_table(places: np.ndarray, width: int) -> np.ndarray:
    """Return sines, then cosines of places [n] as [n width], float64.

    The frequencies are geometric (Vaswani et al. 2017).
    """
    angles = places[:, None] * 1e4 ** (-np.arange(width // 2) / (width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def plane_table(grid: tuple[int, int], width: int, base: int) -> np.ndarray:
    """Return fixed positions [h w width] within a frame.

    They are those of DiT (Peebles & Xie 2023) and Latte. The column is in the first half of the
    features, the row in the second. Both axes are `base` places long, for every grid.
    """
    height, breadth = grid
    shape = (height, breadth, width // 2)
    rows = sincos_table(np.arange(height) * base / height, width // 2)
    columns = sincos_table(np.arange(breadth) * base / breadth, width // 2)

    rows = np.broadcast_to(rows[:, None], shape)
    columns = np.broadcast_to(columns, shape)
    return np.concatenate([columns, rows], -1).astype(np.float32)


def rope_table(grid: Grid, head_width: int, theta: float = 1e4) -> Rope:
    """Return 3D rotary positions (Su et al. 2021) of a token grid.

    Raises:
        ValueError: the head width is odd.
    """
    if head_width % 2:
        raise ValueError(f"Rotary positions need an even head width, not {head_width}.")

    def axis_table(n: int, features: int) -> np.ndarray:
        return np.arange(n)[:, None] * _rope_frequencies(features, theta)

    angles = _over_axes(grid, head_width, axis_table)[..., None, :]  # t h w 1 d/2
    return Rope(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def _rope_frequencies(features: int, theta: float) -> np.ndarray:
    """Return the frequencies [features/2] of one axis, float64."""
    return theta ** (-np.arange(0, features, 2, dtype=np.float64) / features)


def shift_rope(rope: Rope, frames: Int[Array, ""], head_width: int, theta: float = 1e4) -> Rope:
    """Shift a `rope_table` by a traced number of frames.

    It is exact for 2**20 frames and more. Angles are counted in units of 2**-32 turns. Such
    integers wrap around as angles do, where a float32 angle of many turns has lost its fraction.
    """
    features_of_time, _, _ = _features_of_axes(head_width)  # the first features of a head
    freqs = _rope_frequencies(features_of_time, theta)
    steps = np.zeros(head_width // 2, np.uint32)
    steps[: len(freqs)] = np.round(freqs / (2 * np.pi) * 2**32)
    angles = (frames.astype(jnp.uint32) * steps).astype(jnp.float32) * (2 * np.pi / 2**32)

    # Angles add: cos(a + b) and sin(a + b). [d/2] -> [1 1 1 1 d/2]
    cos = jnp.cos(angles)[None, None, None, None]
    sin = jnp.sin(angles)[None, None, None, None]
    return Rope(rope.cos * cos - rope.sin * sin, rope.sin * cos + rope.cos * sin)


def apply_rope(x: Float[Array, "b t h w n d"], rope: Rope) -> Float[Array, "b t h w n d"]:
    """Rotate channel i against channel i + d/2 (half-split form), in float32."""
    cos = rope.cos[None]
    sin = rope.sin[None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)
