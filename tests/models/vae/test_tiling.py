"""Tiles: whatever is computed on them, nothing is lost, doubled or visible where they meet."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.models.vae.tiling import blend_weights, tile_starts, tiled

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [(20, 8, 0), (20, 8, 2), (21, 8, 3), (9, 8, 7), (8, 8, 2), (5, 8, 2), (64, 17, 16), (23, 9, 5)],
)
def test_shares_sum_to_one_and_tiles_overlap(size, tile, overlap):
    tile = min(size, tile)
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] == size - tile
    assert (np.diff(starts) <= tile - overlap).all() and (np.diff(starts) > 0).all()
    weights, total = blend_weights(starts, tile), np.zeros(size)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + tile] += row
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (weights > 0).all()
    if len(starts) > 1:  # a tile hardly counts at its edge, wholly at the frame's
        assert weights[0, 0] == 1 == weights[-1, -1]
        assert not overlap or weights[0, -1] < 0.6 / overlap


@pytest.mark.parametrize("overlap", [0, 1, 4])
@pytest.mark.parametrize("shape", [(1, 2, 13, 21, 3), (2, 8, 6, 1), (6, 30, 2)])
def test_identity_stays(shape, overlap):
    x = RNG.normal(size=shape).astype(np.float32)
    np.testing.assert_allclose(tiled(lambda y: y, x, (6, 7), overlap), x, atol=1e-6)


def up(x):
    return jnp.repeat(jnp.repeat(x, 4, -3), 4, -2)


def down(x):
    return x.reshape(*x.shape[:-3], x.shape[-3] // 4, 4, x.shape[-2] // 4, 4, -1).mean((-4, -2))


def test_frames_grow_and_shrink_and_channels_and_time_change():
    """As decode and encode do: each pixel by itself, so that tiles must give the whole."""

    def decode(z):
        return jnp.concatenate([up(z), up(z)], 1)[..., :2]  # [1 2 h w 3] -> [1 4 4h 4w 2]

    def encode(x):
        return jnp.repeat(down(x)[:, :1], 5, -1)

    z = RNG.normal(size=(1, 2, 10, 7, 3)).astype(np.float32)
    np.testing.assert_allclose(tiled(decode, z, 4, 1), decode(z), atol=1e-6)
    x = RNG.normal(size=(1, 2, 40, 28, 3)).astype(np.float32)
    np.testing.assert_allclose(tiled(encode, x, 16, 3), encode(x), atol=1e-6)


def blur(x):
    """Three 3x3 means with zero padding: a reach of three pixels."""
    for _ in range(3):
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
        h, w = x.shape[-3:-1]
        x = sum(padded[..., i : i + h, j : j + w, :] for i in range(3) for j in range(3)) / 9
    return x


def test_seams_fade_with_overlap():
    x = 1 + 0.1 * RNG.normal(size=(1, 1, 48, 48, 1)).astype(np.float32)
    want = blur(x)
    errors = [float(np.abs(tiled(blur, x, 16, overlap) - want).max()) for overlap in (0, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2 and errors[-1] < 0.25 * errors[0]


def test_an_overlap_is_rounded_up_to_what_the_output_can_show():
    x = RNG.normal(size=(1, 1, 48, 48, 1)).astype(np.float32)
    none, little, one = (tiled(lambda y: down(blur(y)), x, 16, overlap) for overlap in (0, 1, 4))
    np.testing.assert_array_equal(little, one)
    assert np.abs(little - none).max() > 1e-3


def test_a_tile_as_large_as_the_frame_is_the_frame():
    x = RNG.normal(size=(1, 1, 8, 12, 1)).astype(np.float32)
    for tile in (12, (8, 12), 100):
        np.testing.assert_array_equal(tiled(blur, x, tile, 4), blur(x))
    rows = tiled(blur, x, (100, 8), 6)  # only columns are cut
    np.testing.assert_allclose(rows[..., 0, :], blur(x)[..., 0, :], atol=1e-6)


def test_one_tile_is_computed_at_a_time():
    """The program holds `fn` once, however many tiles there are."""
    x = jnp.ones((1, 1, 64, 64, 1))
    text = [str(jax.make_jaxpr(lambda x, t=tile: tiled(jnp.sin, x, t, 0))(x)) for tile in (32, 4)]
    assert [t.count(" sin ") for t in text] == [1, 1]


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (8, 8, "must be larger than their overlap"),
        (8, -1, "must be larger"),
        (0, 0, "must be lar"),
        ((12, 8), 2, r"Frames of \(18, 18\) must be multiples of \(4, 4\)"),
    ],
)
def test_sizes_that_cannot_be(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tiled(
            lambda x: down(x) if message.startswith("Frames") else x,
            jnp.zeros((1, 18, 18, 1)),
            tile,
            overlap,
        )
