"""Patches of a clip, and an initializer for their projection to features."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdx.types import Array, DTypeLike, Float, PRNGKeyArray

Initializer = Callable[..., Array]  # (key, shape, dtype) -> parameter
Patch = tuple[int, int, int]  # frames, rows and columns of one token


def to_patches(x: Float[Array, "b T H W c"], patch: Patch) -> Float[Array, "b t h w k"]:
    """Cut a clip into patches of k = i*j*k*c values, in this order of the axes."""
    i, j, k = patch
    return rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=i, j=j, k=k)


def from_patches(x: Float[Array, "b t h w k"], patch: Patch) -> Float[Array, "b T H W c"]:
    """Join patches into a clip, the inverse of `to_patches`."""
    i, j, k = patch
    return rearrange(x, "b t h w (i j k c) -> b (t i) (h j) (w k) c", i=i, j=j, k=k)


def dct_basis(patch: Patch, channels: int, width: int) -> np.ndarray:
    """Return the `width` lowest frequencies of a patch [pt*ph*pw*channels width].

    The columns are orthonormal: the 3D DCT-II of each channel, ordered by spatial-temporal
    frequency, with the channels in turn. Columns beyond the patch's size are zero.

    Video is smooth and noise is white. These are therefore the directions in which a noisy patch
    carries the most signal, and a projection to start the training from.
    """

    def dct(n: int) -> np.ndarray:
        frequency = np.arange(n)[None]
        position = np.arange(n)[:, None] + 0.5
        norm = np.sqrt(np.where(frequency == 0, 1, 2) / n)
        return np.cos(np.pi * frequency * position / n) * norm  # [position frequency]

    basis = np.einsum("ta,hb,wc->thwabc", *(dct(n) for n in patch))

    # Order the columns by frequency: [positions frequencies].
    frequency = sum(np.square(k / n) for k, n in zip(np.indices(patch), patch, strict=True))
    order = np.argsort(frequency.ravel(), kind="stable")
    basis = basis.reshape(math.prod(patch), -1)[:, order]

    # Give every channel the same basis: [positions*channels frequencies*channels].
    columns = np.einsum("pk,cd->pckd", basis, np.eye(channels))
    columns = columns.reshape(len(basis) * channels, -1)

    out = np.zeros((len(columns), width), np.float32)
    out[:, : columns.shape[1]] = columns[:, :width]
    return out


def low_frequencies(patch: Patch, out: bool = False) -> Initializer:
    """Return an initializer for the projection of patches to features.

    With `out` it is for the projection back: half of the transpose.
    """

    def init(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
        pixels, width = shape[::-1] if out else shape
        basis = dct_basis(patch, pixels // math.prod(patch), width)
        return jnp.asarray(basis.T * 0.5 if out else basis, dtype)

    return init
