"""The forward process against independent float64 formulas, and its conversions."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError, build
from vdx.diffusion import process as process_lib
from vdx.diffusion.process import (
    BETAS,
    PREDICTIONS,
    PROCESSES,
    RectifiedFlow,
    VariancePreserving,
    expand,
    shift_time,
)
from vdx.diffusion.time_sampling import TIME_SAMPLERS

TIMES_TO_TRY = [0.0, 1e-3, 0.0105, 0.3, 0.5, 0.77, 0.999, 1.0]
ALL = [
    VariancePreserving(),
    VariancePreserving(betas="scaled_linear", beta_start=0.00085, beta_end=0.012),
    VariancePreserving(betas="cosine"),
    VariancePreserving(prediction="v", zero_terminal_snr=True),
    RectifiedFlow(),
]


def published_alpha_bar(betas, start, end, steps):
    """The definitions of the papers, one multiplication at a time."""
    table, product = [], 1.0
    for k in range(steps):
        if betas == "linear":
            beta = start + (end - start) * k / (steps - 1)
        elif betas == "scaled_linear":
            beta = (start**0.5 + (end**0.5 - start**0.5) * k / (steps - 1)) ** 2
        else:
            f = [math.cos((j / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (k, k + 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        product *= 1 - beta
        table.append(product)
    return np.array(table)


@pytest.mark.parametrize("betas", BETAS)
def test_discrete_steps_are_the_published_table(betas):
    process = VariancePreserving(betas=betas, beta_start=1e-4, beta_end=0.02)
    want = published_alpha_bar(betas, 1e-4, 0.02, 1000)
    t = (np.arange(1000) + 1) / 1000
    np.testing.assert_allclose(process.alpha(t) ** 2, want, rtol=1e-9)
    np.testing.assert_allclose(process.sigma(t) ** 2, 1 - want, rtol=1e-9)
    # In float32, as in training, t * steps is off by up to 6e-5 of a step.
    t32 = jnp.asarray(t, jnp.float32)
    rtol = 1e-3 if betas == "cosine" else 1e-5  # the clipped last step of cosine is a cliff
    np.testing.assert_allclose(process.alpha(t32) ** 2, want, rtol=rtol)
    np.testing.assert_allclose(process.network_time(t32), np.arange(1000), atol=1e-3)
    assert process.alpha(np.float64(0)) == 1 and process.sigma(0.0) == 0
    middle = process.alpha(np.array(500.5) / 1000)
    np.testing.assert_allclose(middle, (want[499] * want[500]) ** 0.25, rtol=1e-9)


def test_zero_terminal_snr_rescales_as_published():
    plain = VariancePreserving(prediction="v")
    process = VariancePreserving(prediction="v", zero_terminal_snr=True)
    t = (np.arange(1000) + 1) / 1000
    root = plain.alpha(t)
    want = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(process.alpha(t)[:-1], want[:-1], rtol=1e-9)
    assert 0 < process.alpha(1.0) < 1e-5
    with pytest.raises(ConfigError, match="zero_terminal_snr"):
        VariancePreserving(zero_terminal_snr=True)


@pytest.mark.parametrize("process", ALL, ids=str)
def test_schedules_are_monotone_and_log_snr_agrees(process):
    t = np.linspace(0, 1, 1234)
    assert np.all(np.diff(process.alpha(t)) < 0) and np.all(np.diff(process.sigma(t)) >= 0)
    inner = t[1:-1]
    want = np.log(process.alpha(inner) ** 2 / process.sigma(inner) ** 2)
    np.testing.assert_allclose(process.log_snr(inner), want, atol=1e-9)
    np.testing.assert_allclose(process.log_snr(jnp.asarray(inner)), want, atol=2e-3)
    assert process.log_snr(0.0) == np.inf


@pytest.mark.parametrize("name", PROCESSES)
def test_forward_marginals(name):
    process = PROCESSES[name]()
    n, t = 20000, 0.4
    keys = jax.random.split(jax.random.key(0))
    x0 = 0.5 + 0.3 * jax.random.normal(keys[0], (n, 1, 1, 1, 2))
    x_t = process.add_noise(x0, jax.random.normal(keys[1], x0.shape), jnp.full((n,), t))
    a, s = process.alpha(t), process.sigma(t)
    std = math.sqrt((a * 0.3) ** 2 + s**2)
    np.testing.assert_allclose(jnp.mean(x_t, 0).ravel(), a * 0.5, atol=5 * std / n**0.5)
    np.testing.assert_allclose(jnp.std(x_t, 0).ravel(), std, rtol=5 / (2 * n) ** 0.5)


def pairs():
    shape = (len(TIMES_TO_TRY), 2, 3, 3, 4)
    x0 = np.random.default_rng(0).uniform(-1, 1, shape)
    noise = np.random.default_rng(1).normal(size=shape)
    return jnp.asarray(x0, jnp.float32), jnp.asarray(noise, jnp.float32)


@pytest.mark.parametrize(
    "process,kind",
    [
        (process, kind)
        for process, kind in itertools.product(ALL, PREDICTIONS)
        # which the process rejects, see above
        if not (kind == "noise" and getattr(process, "zero_terminal_snr", False))
    ],
    ids=str,
)
def test_conversions_round_trip(process, kind):
    process = dataclasses.replace(process, prediction=kind)
    x0, noise = pairs()
    t = jnp.asarray(TIMES_TO_TRY)
    x_t = process.add_noise(x0, noise, t)
    got_x0, got_noise = process.to_x0_noise(process.from_x0_noise(x0, noise, t), x_t, t)
    assert np.all(np.isfinite(got_x0)) and np.all(np.isfinite(got_noise))
    # Rounding of x_t is divided by alpha or sigma; at exactly 0 that half is not determined.
    alpha, sigma = (np.asarray(f(np.array(TIMES_TO_TRY))) for f in (process.alpha, process.sigma))
    for i in range(len(TIMES_TO_TRY)):
        lost_x0 = 1e-6 / alpha[i] if kind == "noise" and alpha[i] else 2e-6
        lost_noise = 1e-6 / sigma[i] if kind == "x0" and sigma[i] else 4e-6
        if not (kind == "noise" and alpha[i] == 0):
            np.testing.assert_allclose(got_x0[i], x0[i], atol=lost_x0)
        if not (kind == "x0" and sigma[i] == 0):
            np.testing.assert_allclose(got_noise[i], noise[i], atol=lost_noise)


def test_published_targets():
    x0, noise = pairs()
    t = jnp.asarray(TIMES_TO_TRY)
    process = VariancePreserving(prediction="v")
    a, s = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
    np.testing.assert_allclose(process.from_x0_noise(x0, noise, t), a * noise - s * x0)
    np.testing.assert_array_equal(process.from_x0_noise(x0, noise, t, "velocity"), noise - x0)
    np.testing.assert_array_equal(process.from_x0_noise(x0, noise, t, "noise"), noise)
    np.testing.assert_array_equal(process.from_x0_noise(x0, noise, t, "x0"), x0)
    # The velocity is the time derivative of the straight path.
    flow = RectifiedFlow()
    slope = (flow.add_noise(x0, noise, t + 0.25) - flow.add_noise(x0, noise, t)) / 0.25
    np.testing.assert_allclose(slope, flow.from_x0_noise(x0, noise, t), atol=1e-5)


@pytest.mark.parametrize("name,kind", list(itertools.product(PROCESSES, PREDICTIONS)))
def test_determinant_is_that_of_the_map(name, kind):
    process = PROCESSES[name](prediction=kind)
    t = jnp.asarray(0.37)
    both = lambda pair: jnp.stack(
        [
            process.add_noise(pair[:1], pair[1:], t)[0],
            process.from_x0_noise(pair[:1], pair[1:], t)[0],
        ]
    )
    matrix = jax.jit(jax.jacobian(both))(jnp.array([0.2, -0.7]))
    np.testing.assert_allclose(abs(np.linalg.det(matrix)), process.determinant(t), rtol=1e-5)


def test_times_broadcast_to_leading_axes():
    x0, noise = pairs()
    process = RectifiedFlow()
    per_frame = jnp.broadcast_to(jnp.array([0.0, 1.0]), (len(x0), 2))
    x_t = process.add_noise(x0, noise, per_frame)
    np.testing.assert_array_equal(x_t[:, 0], x0[:, 0])
    np.testing.assert_array_equal(x_t[:, 1], noise[:, 1])
    np.testing.assert_allclose(
        process.add_noise(x0, noise, 0.25), 0.75 * x0 + 0.25 * noise, rtol=1e-5, atol=1e-6
    )
    low = process.from_x0_noise(x0.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), 0.5)
    assert low.dtype == jnp.float32


@pytest.mark.parametrize(
    "spec,known",
    [
        ({"name": "rectified"}, "rectified_flow"),
        ({"name": "rectified_flow", "prediction": "eps"}, "noise, x0, v, velocity"),
        ({"name": "variance_preserving", "betas": "sigmoid"}, "linear, scaled_linear, cosine"),
        (
            {"name": "variance_preserving", "beta_start": 0.5},
            r"process\.beta_start = 0\.5 is larger than beta_end = 0\.02",
        ),
    ],
)
def test_errors_say_what_is_known(spec, known):
    with pytest.raises(ConfigError, match=known):
        build(spec, PROCESSES, "process")


@pytest.mark.parametrize("name", TIME_SAMPLERS)
def test_training_times_are_stratified(name):
    times = TIME_SAMPLERS[name]()
    n = 64
    draw = jax.jit(lambda key: times.sample(key, n, num_tokens=16))
    t = draw(jax.random.key(3))
    assert t.shape == (n,) and t.dtype == jnp.float32 and jnp.all((t > 0) & (t < 1))
    u = t if name == "uniform" else jax.scipy.stats.norm.cdf(jnp.log(t / (1 - t)))
    assert sorted(np.floor(np.asarray(u) * n + 1e-3).astype(int) % n) == list(range(n))
    assert np.any(np.diff(u) < 0), "the order is random"
    other = draw(jax.random.key(4))
    assert not np.allclose(np.sort(t), np.sort(other))


def test_each_row_has_the_whole_distribution():
    draw = jax.jit(jax.vmap(lambda key: TIME_SAMPLERS["uniform"]().sample(key, 4, 1)))
    t = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    for row in t.T:
        assert abs(row.mean() - 0.5) < 0.025 and abs(row.std() - 12**-0.5) < 0.015


def test_logit_normal_quantiles():
    times = TIME_SAMPLERS["logit_normal"](mean=-0.5, std=0.8)
    t = np.asarray(jax.jit(lambda key: times.sample(key, 8000, 1))(jax.random.key(0)))
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.5, 0.8], atol=2e-3)


def test_shift_follows_tokens():
    times = TIME_SAMPLERS["uniform"](shift=1.5, base_tokens=100)
    assert times.shift_for(400) == pytest.approx(3.0)
    key = jax.random.key(0)
    plain = TIME_SAMPLERS["uniform"]().sample(key, 8, 400)
    np.testing.assert_allclose(times.sample(key, 8, 400), 3 * plain / (1 + 2 * plain), rtol=1e-6)
    # Esser et al. 2024: the shift multiplies sigma / alpha of rectified flow by s.
    ratio = lambda t: t / (1 - t)
    t = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose(ratio(shift_time(t, 3.0)), 3 * ratio(t))
    with pytest.raises(ConfigError, match=r"shift = 0\.0 is out of range, expected float > 0"):
        TIME_SAMPLERS["uniform"](shift=0.0)


def test_floor_is_below_every_schedule():
    for process in ALL[:3]:
        assert process.alpha(1.0) > process_lib.FLOOR
