"""Flicker and drift: planted faults are seen, and what only moves is not."""

import numpy as np
import pytest

from vdx.data.scenes.world import COLOURS, Object, Scene
from vdx.metrics.temporal_consistency import flicker, identity_drift, lab
from vdx.metrics.tracking import track_object

RNG = np.random.default_rng(0)
TIMES = np.arange(8) / 8


@pytest.fixture(scope="module")
def moving():
    item = Object("square", "red", "right", "large", "slow", x=0.3, radius=0.25)
    return Scene((item,), background="checks").render(TIMES, 48, 48)


def shifted(video, levels):
    return np.clip(video + np.reshape(levels, (-1, 1, 1, 1)), 0, 255).astype(np.uint8)


def test_flicker_grows_with_the_brightness_that_is_planted(moving):
    lifted = np.clip(moving.astype(int) + 40, 0, 255)  # no level is cut off below
    calm, valid = flicker(lifted.astype(np.uint8))
    assert calm < 0.6 and valid > 0.8
    noise = RNG.standard_normal(8)
    values = [flicker(shifted(lifted, sigma * noise))[0] for sigma in (2, 4, 8)]
    assert values[0] > 2 * calm and values[0] < values[1] < values[2]
    # |Y- - 2 Y + Y+| / 2 of white noise: sigma sqrt(6) sqrt(2 / pi) / 2 = 0.98 sigma on average.
    expected = np.abs(noise[:-2] - 2 * noise[1:-1] + noise[2:]).mean() / 2
    assert 0.7 * 8 * expected < values[2] < 1.3 * 8 * expected


def test_motion_and_steady_light_are_no_flicker(moving):
    ramp = shifted(moving, 3.0 * np.arange(8))  # linear: no second difference
    assert flicker(ramp)[0] < 1.0


def masks_of(video):
    return track_object(video).amount > 0.5


def test_identity_drift_sees_a_morph_and_not_light(moving):
    masks = masks_of(moving)
    same, valid = identity_drift(moving, masks)
    assert same < 0.06 and valid == 1.0
    to = np.array(COLOURS["blue"], float)
    drifts = []
    for amount in (0.25, 0.5, 1.0):
        mix = amount * np.linspace(0, 1, 8)[:, None, None, None] * masks[..., None]
        drifts.append(identity_drift((moving * (1 - mix) + to * mix).astype(np.uint8), masks)[0])
    assert drifts[0] > 2 * same and drifts[0] < drifts[1] < drifts[2]
    dimmed = (moving * np.linspace(1, 0.8, 8)[:, None, None, None]).astype(np.uint8)
    assert identity_drift(dimmed, masks)[0] < drifts[0]
    nothing, share = identity_drift(moving, np.zeros_like(masks))
    assert np.isnan(nothing) and share == 0.0


def test_lab_of_known_colours():
    got = lab(np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8))
    want = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    np.testing.assert_allclose(got, want, atol=0.05)
