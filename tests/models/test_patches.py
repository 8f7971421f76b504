"""Patches: cutting and joining, and the basis that projections start from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.models.patches import dct_basis, from_patches, low_frequencies, to_patches

RNG = np.random.default_rng(0)
PATCH = (2, 2, 4)


def test_a_patch_is_a_piece_of_the_clip():
    clip = RNG.normal(size=(2, 4, 6, 8, 3)).astype(np.float32)
    patches = to_patches(clip, PATCH)
    assert patches.shape == (2, 2, 3, 2, 2 * 2 * 4 * 3)
    np.testing.assert_array_equal(patches[1, 1, 2, 0], clip[1, 2:4, 4:6, 0:4].ravel())


def test_joining_is_the_inverse_of_cutting():
    clip = RNG.normal(size=(1, 2, 4, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(from_patches(to_patches(clip, PATCH), PATCH), clip)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_basis_is_orthonormal_and_starts_with_the_means(channels):
    size = 2 * 2 * 4 * channels
    basis = dct_basis(PATCH, channels, size + 2)
    np.testing.assert_allclose(basis[:, :size].T @ basis[:, :size], np.eye(size), atol=1e-6)
    assert not basis[:, size:].any()
    means = basis[:, :channels].reshape(-1, channels, channels)
    np.testing.assert_allclose(means, np.broadcast_to(np.eye(channels) / 4, means.shape), atol=1e-6)


def test_the_projection_back_is_half_of_the_transpose():
    key = jax.random.key(0)
    into = low_frequencies(PATCH)(key, (16, 5), jnp.float32)
    back = low_frequencies(PATCH, out=True)(key, (5, 16), jnp.float32)
    np.testing.assert_array_equal(back, 0.5 * into.T)
