"""Calibration of the step cache: the search, its measurements, and when they are refused."""

import dataclasses

import jax
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.diffusion.process import RectifiedFlow
from vdx.generate import cache_calibration
from vdx.generate.cache_calibration import (
    FILE,
    CacheCalibration,
    calibrate,
    check_calibration,
    read_calibration,
)
from vdx.generate.generator import Generator, Sampling
from vdx.generate.video_io import to_uint8
from vdx.metrics.similarity import ssim
from vdx.models.denoiser import Denoiser

PROMPTS = ("a red circle moves right", "a blue square")
FLOOR = 0.995
CLIP = {"num_frames": 1, "fps": 8.0}


@pytest.fixture(scope="module")
def generator(randomise):
    model = Denoiser(
        {"name": "transformer", "width": 16, "depth": 1, "heads": 2, "patch": (1, 4, 4)},
        {
            "text": {
                "encoder": {
                    "name": "bytes",
                    "length": 64,
                    "words": 24,
                    "width": 8,
                    "depth": 1,
                    "heads": 1,
                }
            }
        },
    )
    params = randomise(jax.eval_shape(model.new_params, jax.random.key(0)))
    return Generator(
        model, RectifiedFlow(), Sampling("euler", 10, guidance=2.0), (12, 12, 3)
    ), params


@pytest.fixture(scope="module")
def calibration(generator):
    lines = []
    found = calibrate(
        *generator, PROMPTS, seed=3, floor=FLOOR, weights="abc", log=lines.append, **CLIP
    )
    assert any("below the floor" in line for line in lines), lines
    return found


def test_measurements_are_of_the_clips_that_are_drawn(generator, calibration):
    plain, params = generator
    cached = dataclasses.replace(
        plain, sampling=dataclasses.replace(plain.sampling, cache_threshold=calibration.threshold)
    )
    assert calibration.threshold > 0 and 3 <= min(calibration.evaluations) < calibration.full == 10
    for i, prompt in enumerate(PROMPTS):
        one, two = (to_uint8(g(params, [prompt], [3 + i], **CLIP)[0]) for g in (plain, cached))
        assert ssim(one, two) == pytest.approx(calibration.ssim[i], abs=2e-3)
        assert calibration.ssim[i] >= FLOOR


def test_without_a_good_threshold_nothing_is_skipped(generator, monkeypatch):
    monkeypatch.setattr(cache_calibration, "ssim", lambda one, two: 0.5)
    found = calibrate(
        *generator, PROMPTS, seed=0, floor=0.9, weights="abc", log=lambda line: None, **CLIP
    )
    assert found.threshold == 0 and found.evaluations == (10, 10) and found.ssim == (1.0, 1.0)
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        calibrate(*generator, PROMPTS, seed=0, floor=1.5, weights="abc", **CLIP)


def test_a_calibration_is_of_one_sampling_and_weights(calibration, generator, tmp_path):
    with pytest.raises(ConfigError, match=r"--calibrate_cache=0\.95"):
        read_calibration(tmp_path)
    calibration.save(tmp_path)
    again = read_calibration(tmp_path)
    assert isinstance(again, CacheCalibration) and (tmp_path / FILE).exists()
    assert (again.threshold, again.ssim, again.seeds) == (
        calibration.threshold,
        calibration.ssim,
        (3, 4),
    )
    sampling = dataclasses.asdict(generator[0].sampling) | {"batch": 2, "cache_threshold": 0.7}
    check_calibration(again, "abc", sampling, 1, 8.0, "x")
    for change, wrong in (
        ({"weights": "abd"}, "weights = 'abd', not 'abc'"),
        ({"num_frames": 2}, "num_frames = 2, not 1"),
        ({"sampling": sampling | {"steps": 9}}, "steps = 9, not 10"),
    ):
        given = {"weights": "abc", "sampling": sampling, "num_frames": 1, "fps": 8.0} | change
        with pytest.raises(ConfigError, match=f"^x was found for something else: {wrong}"):
            check_calibration(again, where="x", **given)


def test_threshold_0_is_the_plain_program(generator):
    """Without a choice in each step."""
    plain, params = generator
    batch = plain.text_batch(PROMPTS, 1, 8.0)
    noise = np.zeros((2, 1, 12, 12, 3), np.float32)
    keys = jax.random.split(jax.random.key(0))

    def program(threshold):
        draw = lambda *args: plain.draw(*args, threshold)
        return str(jax.make_jaxpr(draw)(params, batch, noise, keys))

    assert "cond[" not in program(0.0) and "cond[" in program(0.1)
