"""Loss terms and weightings against the formulas of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.diffusion.losses import (
    WEIGHTINGS,
    DenoisingLoss,
    FrameTimes,
    bin_by_time,
    denoising_error,
    shared_times,
)
from vdx.diffusion.process import PREDICTIONS, PROCESSES

T = jnp.array([0.06, 0.2, 0.4, 0.6, 0.7])  # every alpha and sigma is above the floor of 0.05


def random_pair(seed, b=len(T)):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(k, (b, 2, 3, 3, 4)) for k in keys]


def frame_times(t, loss_mask=None, report_t=None):
    """A time for each frame; by default every frame is learned from."""
    mask = jnp.ones(t.shape, bool) if loss_mask is None else loss_mask
    return FrameTimes(
        t=t, loss_mask=mask, compact_t=t, report_t=t if report_t is None else report_t
    )


def denoising_loss(process, weighting, prediction, x0, noise, t):
    """The loss of clips, each with one time."""
    term = DenoisingLoss(weighting={"name": weighting})
    return term(process, prediction, x0, noise, shared_times(t, x0.shape[1]))


def loss_of(process, weighting, x0_guess, x0, noise, t):
    """The loss of the prediction that means `x0_guess` at x_t."""
    x_t = process.add_noise(x0, noise, t)
    alpha, sigma = (f(t)[:, None, None, None, None] for f in (process.alpha, process.sigma))
    prediction = process.from_x0_noise(x0_guess, (x_t - alpha * x0_guess) / sigma, t)
    return denoising_loss(process, weighting, prediction, x0, noise, t)


@pytest.mark.parametrize(
    "kind,formula",
    [
        ("noise", lambda snr, g: jnp.minimum(snr, g) / snr),
        ("v", lambda snr, g: jnp.minimum(snr, g) / (snr + 1)),
        ("x0", jnp.minimum),
    ],
)
def test_min_snr_as_published(kind, formula):
    process = PROCESSES["variance_preserving"](prediction=kind)
    snr = jnp.exp(process.log_snr(T))
    got = WEIGHTINGS["min_snr"](gamma=5.0)(process, T)
    np.testing.assert_allclose(got, formula(snr, 5.0), rtol=1e-4)


def test_min_snr_of_flow_velocity():
    t = np.asarray(T)
    snr = ((1 - t) / t) ** 2
    got = WEIGHTINGS["min_snr"]()(PROCESSES["rectified_flow"](), T)
    np.testing.assert_allclose(got, np.minimum(snr, 5) * t**2, rtol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("weight", ["min_snr", "velocity"])
def test_weighted_loss_does_not_depend_on_the_prediction(name, weight):
    guess, x0, noise = random_pair(0)
    losses = [
        loss_of(PROCESSES[name](prediction=kind), weight, guess, x0, noise, T)
        for kind in PREDICTIONS
    ]
    for loss in losses[1:]:
        np.testing.assert_allclose(loss, losses[0], rtol=1e-3)


@pytest.mark.parametrize(
    "name,velocity", [("variance_preserving", "v"), ("rectified_flow", "velocity")]
)
def test_velocity_weight_is_the_velocity_loss(name, velocity):
    guess, x0, noise = random_pair(1)
    plain = loss_of(PROCESSES[name](prediction=velocity), "none", guess, x0, noise, T)
    for kind in PREDICTIONS:
        got = loss_of(PROCESSES[name](prediction=kind), "velocity", guess, x0, noise, T)
        np.testing.assert_allclose(got, plain, rtol=1e-3)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("weight", WEIGHTINGS)
def test_weights_are_finite_at_the_ends(name, kind, weight):
    ends = jnp.array([0.0, 1e-6, 1 - 1e-6, 1.0])
    got = WEIGHTINGS[weight]()(PROCESSES[name](prediction=kind), ends)
    assert got.shape == (4,) and np.all(np.isfinite(got)) and np.all(got >= 0)
    if weight == "velocity":
        assert np.all(got <= 2 / 0.05**2)
    if weight == "min_snr" and kind == "x0":
        assert got[0] == pytest.approx(5)
    if weight == "min_snr" and kind == "noise" and name == "rectified_flow":
        assert got[-1] == pytest.approx(1)


def test_loss_is_a_float32_mean_per_sample():
    process = PROCESSES["rectified_flow"]()
    x0, noise, prediction = (a.astype(jnp.bfloat16) for a in random_pair(2))
    loss = denoising_loss(process, "none", prediction, x0, noise, T)
    p, x, n = (np.asarray(a, np.float64) for a in (prediction, x0, noise))
    np.testing.assert_allclose(loss, ((p - (n - x)) ** 2).mean((1, 2, 3, 4)), rtol=1e-5)
    assert loss.dtype == jnp.float32


def test_loss_with_a_time_per_frame():
    process = PROCESSES["rectified_flow"](prediction="x0")
    x0, noise, guess = random_pair(3)
    t = jnp.stack([T, T[::-1]], axis=1)
    term = DenoisingLoss(weighting={"name": "velocity"})
    want = (((guess - x0) / t[:, :, None, None, None]) ** 2).mean((2, 3, 4))
    of_frames = term(process, guess, x0, noise, frame_times(t))
    np.testing.assert_allclose(of_frames, want, rtol=1e-5)
    of_clips = term(process, guess, x0, noise, frame_times(t, report_t=T))
    np.testing.assert_allclose(of_clips, want.mean(1), rtol=1e-5)


def test_frames_outside_the_mask_do_not_count():
    process = PROCESSES["rectified_flow"](prediction="x0")
    x0, noise, guess = random_pair(4)
    t = jnp.stack([T, T], axis=1)
    mask = jnp.array([[True, True], [False, True], [True, False], [True, True], [False, True]])
    got = DenoisingLoss()(process, guess, x0, noise, frame_times(t, mask, report_t=T))
    of_frames = np.asarray((guess - x0) ** 2).mean((2, 3, 4))
    want = [row[learned].mean() for row, learned in zip(of_frames, np.asarray(mask), strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_clips_loss_has_the_bits_of_a_plain_mean():
    """The mask of a clip whose frames are all learned from costs no rounding."""
    process = PROCESSES["rectified_flow"]()
    x0, noise, prediction = random_pair(5)
    weighting = WEIGHTINGS["velocity"]()

    @jax.jit
    def plain(prediction):
        error = denoising_error(process, weighting, prediction, x0, noise, T)
        return jnp.mean(error, axis=(1, 2, 3, 4)).mean()

    @jax.jit
    def masked(prediction):
        return denoising_loss(process, "velocity", prediction, x0, noise, T).mean()

    for got, want in zip(
        jax.value_and_grad(masked)(prediction),
        jax.value_and_grad(plain)(prediction),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_an_unknown_weighting_names_the_nearest():
    with pytest.raises(ConfigError, match=r"weighting: unknown name 'velocty'.*'velocity'"):
        DenoisingLoss(weighting={"name": "velocty"})


def test_bin_by_time():
    sums, counts = bin_by_time(jnp.array([1.0, 2, 4, 8, 16]), jnp.array([0, 0.24, 0.25, 0.6, 1]), 4)
    np.testing.assert_array_equal(sums, [3, 4, 8, 16])
    np.testing.assert_array_equal(counts, [2, 1, 1, 1])
