"""HDR to SDR against the formulas of the Recommendations, written again in float64."""

import numpy as np
import pytest
from scipy.interpolate import CubicHermiteSpline

from vdx.data.tone_mapping import GAMUTS, HLG, PQ, gamut_matrix, to_sdr

SDR = 1
CODES = np.arange(1024) / 1023  # every level of 10 bits
TO_BT709 = np.array(  # BT.2407, equation (2)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)


def frame(signal):
    """Return R'G'B' in [0, 1], [n 3], as a frame of 16 bits."""
    return np.rint(np.asarray(signal) * 65535).astype(np.uint16)[None]


def pq_eotf(signal):
    """BT.2100, table 4, with its constants as decimals."""
    root = signal ** (1 / 78.84375)
    return 1e4 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (
        1 / 0.1593017578125
    )


def pq_inverse(light):
    grid = np.linspace(0, 1, 200_001)
    return np.interp(light, pq_eotf(grid), grid)


def hlg_eotf(signal):
    """BT.2100, table 5: inverse OETF, then the OOTF of a grey at 1,000 cd/m2."""
    scene = np.where(
        signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )
    return 1000 * scene**1.2


def eetf(light):
    """BT.2390, 5.4.1: identity up to the knee, then the cubic that ends flat at the target."""
    top = pq_inverse(1000)
    target = pq_inverse(203) / top
    knee = 1.5 * target - 0.5
    spline = CubicHermiteSpline([knee, 1], [knee, target], [1, 0])
    signal = np.minimum(pq_inverse(light) / top, 1)
    return pq_eotf(np.where(signal < knee, signal, spline(signal)) * top)


@pytest.mark.parametrize(("transfer", "eotf"), [(PQ, pq_eotf), (HLG, hlg_eotf)])
def test_grey_ramps_follow_the_recommendations(transfer, eotf):
    got = to_sdr(frame(CODES[:, None].repeat(3, 1)), transfer, 9)[0].astype(int)
    expected = 255 * (eetf(eotf(CODES)) / 203) ** (1 / 2.4)
    assert np.abs(got - expected[:, None]).max() <= 1
    assert np.ptp(got, axis=1).max() == 0  # grey stays grey
    assert (np.diff(got[:, 0]) >= 0).all() and got[0, 0] == 0 and got[-1, 0] == 255


@pytest.mark.parametrize(("transfer", "white"), [(PQ, 0.58), (HLG, 0.75)])
def test_reference_white_of_bt2408_is_near_white_in_both(transfer, white):
    got = to_sdr(frame([[white] * 3]), transfer, 9)
    assert 226 <= got.min() <= got.max() <= 234


def test_the_matrix_of_bt2020_is_the_published_one():
    np.testing.assert_allclose(gamut_matrix(GAMUTS[9]), TO_BT709, atol=1e-4)


@pytest.mark.parametrize("primaries", GAMUTS)
def test_sdr_of_a_wide_gamut_shows_the_colours_of_bt709(primaries):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (500, 3))
    wide = ((colours / 255) ** 2.4) @ np.linalg.inv(gamut_matrix(GAMUTS[primaries])).T
    got = to_sdr(frame(np.clip(wide, 0, 1) ** (1 / 2.4)), SDR, primaries)[0]
    assert np.abs(got.astype(int) - colours).max() <= 1


def test_colours_outside_bt709_are_clipped():
    got = to_sdr(frame([[0, 1, 0]]), SDR, 9)[0, 0]
    assert got.tolist() == [0, 255, 0]


def test_hlg_of_a_colour_has_the_ootf_of_its_luminance():
    signal = np.array([0.6, 0.4, 0.2])
    scene = np.where(
        signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )
    display = 1000 * scene * (scene @ [0.2627, 0.6780, 0.0593]) ** 0.2
    expected = 255 * np.clip(TO_BT709 @ eetf(display) / 203, 0, 1) ** (1 / 2.4)
    assert np.abs(to_sdr(frame([signal]), HLG, 9)[0, 0] - expected).max() <= 1


def test_rows_do_not_depend_on_the_blocks_that_bound_memory():
    levels = np.random.default_rng(1).integers(0, 65536, (600, 4, 3), np.uint16)
    whole = to_sdr(levels, HLG, 9)
    np.testing.assert_array_equal(whole[500:], to_sdr(levels[500:], HLG, 9))
