"""The projection of patches to features, and back."""

import math

import jax.numpy as jnp
import numpy as np


def dct_basis(patch: tuple[int, int, int], channels: int, width: int) -> np.ndarray:
    """The `width` lowest frequencies of a patch [pt*ph*pw*channels, width], orthonormal columns.

    3D DCT-II of each channel, ordered by spatial-temporal frequency, channels in turn; columns
    beyond the patch's size are zero. Video is smooth and noise is white, so these are the
    directions in which a noisy patch says most: a projection to start training from.
    """

    def dct(n: int) -> np.ndarray:
        k, x = np.arange(n)[None], np.arange(n)[:, None] + 0.5
        return np.cos(np.pi * k * x / n) * np.sqrt(np.where(k == 0, 1, 2) / n)  # [x k]

    basis = np.einsum("ta,hb,wc->thwabc", *(dct(n) for n in patch))
    frequency = sum(np.square(k / n) for k, n in zip(np.indices(patch), patch, strict=True))
    order = np.argsort(frequency.ravel(), kind="stable")
    basis = basis.reshape(math.prod(patch), -1)[:, order]
    every = np.einsum("pk,cd->pckd", basis, np.eye(channels)).reshape(len(basis) * channels, -1)
    out = np.zeros((len(every), width), np.float32)
    out[:, : every.shape[1]] = every[:, :width]
    return out


def low_frequencies(patch: tuple[int, int, int], out: bool = False):
    """An initializer for the projection of patches to features, or (`out`) back."""

    def init(key, shape, dtype=jnp.float32):
        pixels, width = shape[::-1] if out else shape
        basis = dct_basis(patch, pixels // math.prod(patch), width)
        return jnp.asarray(basis.T * 0.5 if out else basis, dtype)

    return init
