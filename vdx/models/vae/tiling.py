"""Large frames in tiles: any function of frames, run tile by tile, seams blended."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdx.types import Array, Float


def tile_starts(size: int, tile: int, overlap: int) -> np.ndarray:
    """Where tiles start so that the fewest cover `size`, evenly spread, overlapping by at least
    `overlap`."""
    count = 1 if size <= tile else math.ceil((size - overlap) / (tile - overlap))
    return np.linspace(0, size - tile, count).astype(np.int32)  # rounded down: no step too long


def blend_weights(starts: np.ndarray, tile: int) -> np.ndarray:
    """[tiles, tile]: each tile's share of what it covers; shares sum to one at every place.

    A share rises linearly from a tile's edge to the end of its overlap with the neighbour.
    """
    place = np.arange(tile) + 0.5
    overlaps = tile - np.diff(starts)
    left = np.array([1, *overlaps])[:, None]  # 1: no ramp at the border of the frame
    right = np.array([*overlaps, 1])[:, None]
    ramps = np.minimum(place / np.maximum(left, 1), place[::-1] / np.maximum(right, 1))
    weights = np.minimum(ramps, 1)
    total = np.zeros(starts[-1] + tile)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    return np.stack(
        [row / total[start : start + tile] for start, row in zip(starts, weights, strict=True)]
    ).astype(np.float32)


def tiled(
    fn: Callable[[Array], Any],
    x: Float[Array, "... h w c"],
    tile: int | tuple[int, int],
    overlap: int,
) -> Float[Array, "... H W C"]:
    """fn(x), computed on tiles of `tile` (height, width) that overlap by at least `overlap`.

    Sizes are in pixels of `x`. `fn` may enlarge or reduce frames (decode, encode) and change the
    axes before them. Tiles are of one size, so that one program serves all, and run one after
    another, so that one is in memory. An axis no longer than a tile is not cut. Beyond a tile's
    edge `fn` sees its own padding: choose an overlap of about twice its reach.
    Raises ValueError for sizes that cannot be.
    """
    size = np.array(x.shape[-3:-1])
    extent = np.minimum(np.broadcast_to(tile, 2), size)
    cut = extent < size
    if overlap < 0 or (extent < 1).any() or (extent[cut] <= overlap).any():
        raise ValueError(
            f"Tiles of {tile} with overlap {overlap}: tiles must be larger than "
            "their overlap, which is not negative."
        )
    if not cut.any():
        return fn(x)
    shape = (*x.shape[:-3], *extent.tolist(), x.shape[-1])
    piece = jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, x.dtype))
    # A tile may start at multiples of `step`, which become multiples of `rise` in the output.
    common = np.gcd(extent, piece.shape[-3:-1])
    step, rise = extent // common, np.array(piece.shape[-3:-1]) // common
    if (size % step).any():
        raise ValueError(
            f"Frames of {tuple(size.tolist())} must be multiples of "
            f"{tuple(step.tolist())} to be cut into tiles of {tile}."
        )
    starts = [
        tile_starts(n, e, o)
        for n, e, o in zip(size // step, common, -(-overlap // step), strict=True)
    ]
    shares = [
        jnp.asarray(blend_weights(s * r, n))
        for s, r, n in zip(starts, rise, piece.shape[-3:-1], strict=True)
    ]
    corners = jnp.stack(jnp.meshgrid(*starts, indexing="ij"), -1).reshape(-1, 2)

    def add(i, out):
        def at(ndim, unit):
            return (*[0] * (ndim - 3), *(corners[i] * unit), 0)

        y = fn(jax.lax.dynamic_slice(x, at(x.ndim, step), shape))
        row, column = i // len(starts[1]), i % len(starts[1])
        y = y * (shares[0][row][:, None, None] * shares[1][column][:, None]).astype(y.dtype)
        before = jax.lax.dynamic_slice(out, at(out.ndim, rise), y.shape)
        return jax.lax.dynamic_update_slice(out, before + y, at(out.ndim, rise))

    out = jnp.zeros(
        (*piece.shape[:-3], *(size // step * rise).tolist(), piece.shape[-1]), piece.dtype
    )
    return jax.lax.fori_loop(0, len(corners), add, out)
