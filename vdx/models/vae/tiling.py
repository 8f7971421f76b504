"""Functions of large frames, computed tile by tile, with blended seams."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vdx.types import Array, Float, Int


def tile_starts(size: int, tile: int, overlap: int) -> Int[np.ndarray, "n"]:
    """Return where tiles start so that the fewest cover `size`.

    They are evenly spread and overlap by at least `overlap`.
    """
    count = 1 if size <= tile else math.ceil((size - overlap) / (tile - overlap))
    return np.linspace(0, size - tile, count).astype(np.int32)  # rounded down: no step too long


def blend_weights(starts: Int[np.ndarray, "n"], tile: int) -> Float[np.ndarray, "n tile"]:
    """Return each tile's share of the positions that it covers.

    A share rises linearly from a tile's edge to the end of its overlap with the neighbour. The
    shares sum to one at every position.
    """
    position = np.arange(tile) + 0.5
    overlaps = tile - np.diff(starts)
    left = np.array([1, *overlaps])[:, None]  # 1: no ramp at the border of the frame
    right = np.array([*overlaps, 1])[:, None]
    ramps = np.minimum(position / np.maximum(left, 1), position[::-1] / np.maximum(right, 1))
    weights = np.minimum(ramps, 1)

    total = np.zeros(starts[-1] + tile)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    shares = [row / total[start : start + tile] for start, row in zip(starts, weights, strict=True)]
    return np.stack(shares).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """The places of tiles in the input and in the output.

    Each array is over (height, width). A tile may start at multiples of `step` in the input, which
    become multiples of `rise` in the output.
    """

    extent: Int[np.ndarray, "2"]  # size of a tile of the input
    step: Int[np.ndarray, "2"]  # input pixels between places where a tile may start
    rise: Int[np.ndarray, "2"]  # output pixels between the same places
    starts: tuple[Int[np.ndarray, "rows"], Int[np.ndarray, "columns"]]  # in steps
    out_size: Int[np.ndarray, "2"]  # size of the whole output
    out_extent: tuple[int, int]  # size of a tile of the output

    def shares(self) -> tuple[Array, Array]:
        """Return the blend weights along the height and along the width."""
        rows, columns = (
            jnp.asarray(blend_weights(starts * rise, extent))
            for starts, rise, extent in zip(self.starts, self.rise, self.out_extent, strict=True)
        )
        return rows, columns

    def corners(self) -> Int[Array, "n 2"]:
        """Return the start of every tile, row by row, in steps."""
        return jnp.stack(jnp.meshgrid(*self.starts, indexing="ij"), -1).reshape(-1, 2)


def tiled(
    fn: Callable[[Array], Array],
    x: Float[Array, "... h w c"],
    tile: int | tuple[int, int],
    overlap: int,
) -> Float[Array, "... H W C"]:
    """Compute fn(x) on overlapping tiles.

    Tiles are `tile` (height, width) large and overlap by at least `overlap`. Sizes are in pixels of
    `x`. `fn` may enlarge or reduce frames (decode, encode) and change the axes before them. Tiles
    have one size, so that one program serves all. They are computed one after another, so that one
    is in memory. An axis no longer than a tile is not cut. Beyond a tile's edge `fn` reads its own
    padding: choose an overlap of about twice its reach. Raises ValueError for sizes that do not
    divide into such tiles.
    """
    # Check the sizes.
    size = np.array(x.shape[-3:-1])
    extent = np.minimum(np.broadcast_to(tile, 2), size)
    cut = extent < size
    if overlap < 0 or (extent < 1).any() or (extent[cut] <= overlap).any():
        raise ValueError(
            f"Tiles of {tile} with overlap {overlap}: tiles must be larger than "
            "their overlap, which is not negative."
        )

    # One tile is the whole frame.
    if not cut.any():
        return fn(x)

    # The shape of one output decides where tiles may start.
    tile_shape = (*x.shape[:-3], *extent.tolist(), x.shape[-1])
    piece = jax.eval_shape(fn, jax.ShapeDtypeStruct(tile_shape, x.dtype))
    plan = _plan(size, extent, piece.shape[-3:-1], tile, overlap)
    return _blend_tiles(fn, x, plan, piece)


def _plan(
    size: Int[np.ndarray, "2"],
    extent: Int[np.ndarray, "2"],
    out_extent: tuple[int, int],
    tile: int | tuple[int, int],
    overlap: int,
) -> TilePlan:
    """Place the tiles. Raises ValueError if none can start where the last one has to."""
    common = np.gcd(extent, out_extent)
    step = extent // common
    rise = np.array(out_extent) // common
    if (size % step).any():
        raise ValueError(
            f"Frames of {tuple(size.tolist())} must be multiples of "
            f"{tuple(step.tolist())} to be cut into tiles of {tile}."
        )
    overlap_steps = -(-overlap // step)  # rounded up
    axes = np.stack([size // step, common, overlap_steps], 1)  # [axis (size, tile, overlap)]
    rows, columns = (tile_starts(*sizes) for sizes in axes.tolist())
    return TilePlan(extent, step, rise, (rows, columns), size // step * rise, out_extent)


def _blend_tiles(
    fn: Callable[[Array], Array],
    x: Float[Array, "... h w c"],
    plan: TilePlan,
    piece: jax.ShapeDtypeStruct,
) -> Float[Array, "... H W C"]:
    """Add up the outputs of all tiles, each multiplied by its share.

    piece: one output.
    """
    tile_shape = (*x.shape[:-3], *plan.extent.tolist(), x.shape[-1])
    row_shares, column_shares = plan.shares()
    corners = plan.corners()
    columns = len(plan.starts[1])

    def add_tile(i: Array, out: Array) -> Array:
        def corner(ndim: int, unit: np.ndarray) -> tuple[int | Array, ...]:
            return (*[0] * (ndim - 3), *(corners[i] * unit), 0)

        # One tile, multiplied by its share.
        y = fn(jax.lax.dynamic_slice(x, corner(x.ndim, plan.step), tile_shape))
        row_share = row_shares[i // columns][:, None, None]
        column_share = column_shares[i % columns][None, :, None]
        share = (row_share * column_share).astype(y.dtype)  # [h w 1]
        y = y * jnp.broadcast_to(share, y.shape)

        # Add it to the output.
        place = corner(out.ndim, plan.rise)
        before = jax.lax.dynamic_slice(out, place, y.shape)
        return jax.lax.dynamic_update_slice(out, before + y, place)

    out_shape = (*piece.shape[:-3], *plan.out_size.tolist(), piece.shape[-1])
    out = jnp.zeros(out_shape, piece.dtype)
    return jax.lax.fori_loop(0, len(corners), add_tile, out)
