"""SSIM against its definition, place by place."""

import numpy as np
import pytest

from vdx.metrics.similarity import ssim

RNG = np.random.default_rng(0)
ONE = RNG.integers(0, 256, (2, 13, 15, 3)).astype(np.uint8)


def by_definition(one, two):
    """Weighted means, variances and the covariance of every window by itself (eq. 13 to 16)."""
    at = np.arange(-5, 6)
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights /= weights.sum()
    found = []
    for t, i, j, c in np.ndindex(len(one), one.shape[1] - 10, one.shape[2] - 10, one.shape[3]):
        x, y = (a[t, i : i + 11, j : j + 11, c].astype(float) for a in (one, two))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        found.append(
            (2 * mx * my + 2.55**2)
            * (2 * cov + 7.65**2)
            / ((mx**2 + my**2 + 2.55**2) * (vx + vy + 7.65**2))
        )
    return np.mean(found)


@pytest.mark.parametrize("spread", [0, 5, 60, 400])
def test_it_is_its_definition(spread):
    two = np.clip(ONE + RNG.normal(size=ONE.shape) * spread, 0, 255).astype(np.uint8)
    assert ssim(ONE, two) == pytest.approx(by_definition(ONE, two), abs=1e-9)
    assert ssim(ONE, two) == pytest.approx(ssim(two, ONE), abs=1e-12)
    assert (ssim(ONE, two) == pytest.approx(1)) == (spread == 0)


def test_what_it_cannot_compare():
    for other in (ONE[:, :-1], ONE.astype(np.float32), ONE[0]):
        with pytest.raises(ValueError, match="SSIM compares"):
            ssim(ONE, other)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(ONE[:, :10], ONE[:, :10])
