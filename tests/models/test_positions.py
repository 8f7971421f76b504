"""Positions against their definitions in float64 numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_layers import close
from vdx.models.positions import apply_rope, place_table, rope_table

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("head", "widths"), [(64, (24, 20, 20)), (16, (8, 4, 4)), (128, (44, 42, 42)), (4, (4, 0, 0))]
)
def test_rope_table_divides_the_channels_as_documented(head, widths):
    grid = (3, 4, 5)
    cos, sin = rope_table(grid, head)
    assert cos.shape == sin.shape == (*grid, 1, head // 2) and sum(widths) == head
    for t, h, w in [(0, 0, 0), (2, 1, 4), (1, 3, 0)]:
        angles = [
            place * 10_000.0 ** (-2 * i / width)
            for place, width in zip((t, h, w), widths, strict=True)
            for i in range(width // 2)
        ]
        close(cos[t, h, w, 0], np.cos(angles))
        close(sin[t, h, w, 0], np.sin(angles))


def test_places_differ_and_a_clip_twice_as_fine_has_the_same_ones():
    table = place_table((2, 4, 8), 32)
    assert table.shape == (2, 4, 8, 32) and np.abs(table).max() <= 1
    flat = table.reshape(-1, 32)
    far = np.abs(flat[:, None] - flat).max(-1) + np.eye(len(flat))
    assert far.min() > 0.1
    # The slowest cosine of the rows says how far down a token is, whatever the grid.
    height = lambda n: place_table((1, n, 1), 30)[0, :, 0, 10]
    close(height(4), np.cos(np.pi * (np.arange(4) + 0.5) / 4))
    close(height(8).reshape(4, 2).mean(1), height(4), 0.03)


def test_rope_rotates_pairs_half_a_head_apart():
    rope = rope_table((1, 1, 3), 12)
    x = RNG.normal(size=(1, 1, 1, 3, 1, 12))
    angles = np.arctan2(rope[1], rope[0]).astype(np.float64)
    pairs = (x[..., :6] + 1j * x[..., 6:]) * np.exp(1j * angles)
    want = np.concatenate([pairs.real, pairs.imag], -1)
    close(apply_rope(jnp.asarray(x, jnp.float32), rope), want)


def test_rope_scores_depend_on_differences_of_position_alone():
    grid = (4, 4, 4)
    rope = rope_table(grid, 24)
    q, k = (
        jnp.broadcast_to(jnp.asarray(RNG.normal(size=24), jnp.float32), (1, *grid, 1, 24))
        for _ in "qk"
    )
    q, k = (np.asarray(apply_rope(x, rope))[0, ..., 0, :] for x in (q, k))
    score = lambda a, b: q[a] @ k[b]
    for a, b in [((0, 0, 0), (1, 2, 1)), ((2, 1, 0), (0, 1, 2)), ((1, 1, 1), (1, 1, 1))]:
        moved = tuple(np.add(a, 1)), tuple(np.add(b, 1))
        close(score(*moved), score(a, b), 1e-5)
        for axis in range(3):  # and on those of every axis
            other = list(b)
            other[axis] += 1
            assert abs(score(a, tuple(other)) - score(a, b)) > 1e-3


def test_rope_keeps_the_type_and_refuses_an_odd_head():
    x = jnp.ones((1, 2, 1, 1, 1, 6), jnp.bfloat16)
    assert apply_rope(x, rope_table((2, 1, 1), 6)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="even head width, not 5"):
        rope_table((1, 1, 1), 5)
