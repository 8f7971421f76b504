"""The step cache against a loop that states its rule once more."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.diffusion.process import RectifiedFlow
from vdx.diffusion.samplers import SAMPLERS, run_steps, sample, step_table
from vdx.diffusion.step_cache import StepCache
from vdx.diffusion.timesteps import uniform_timesteps

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 2, 3, 3, 2)).astype(np.float32)
FLOW = RectifiedFlow()
STEPS = 12


def network(x, t):
    """A velocity that changes with x and, ever faster, with t."""
    return jnp.sin(x) + jnp.cos(6 * t[:, None, None, None, None] ** 3) * jnp.tanh(2 * x)


@functools.cache
def euler(interval):
    """Jitted: a clip and a threshold -> what run_steps returns."""
    one = SAMPLERS["euler"]()
    rows = step_table(FLOW, one, uniform_timesteps(FLOW, STEPS))
    return jax.jit(
        lambda x, threshold: run_steps(
            network, FLOW, one, one.start(x), rows, None, StepCache(threshold, interval)
        )
    )


def draw(threshold, interval=(0.0, 1.0), x=X):
    """(clip, which evaluations were made)"""
    carry, made = euler(interval)(x, threshold)
    return np.asarray(carry[0]), np.asarray(made)


def by_hand(threshold, interval=(0.0, 1.0)):
    """Euler's method, step by step."""
    times, x, made = uniform_timesteps(FLOW, STEPS), X.astype(np.float64), []
    inside = (times >= interval[0]) & (times <= interval[1])
    size = lambda a: np.abs(a).mean((1, 2, 3, 4))
    last_x = last = rate = None
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        ask = (
            i < 2
            or i == STEPS - 1
            or inside[i] != inside[i - 1]
            or (rate * size(x - last_x) / size(last) >= threshold).any()
        )
        made.append(ask)
        if ask:
            answer = np.asarray(network(x, np.full(2, t)), np.float64)
            if last is not None:
                rate = size(answer - last) / size(x - last_x)
            last_x, last = x, answer
        else:
            answer = last + x - last_x
        x = x + (s - t) * answer
    return x, np.array(made)


@pytest.mark.parametrize(
    ("threshold", "interval"),
    [(0.15, (0.0, 1.0)), (0.3, (0.0, 1.0)), (0.3, (0.3, 0.6)), (1e9, (0.0, 1.0))],
)
def test_the_rule(threshold, interval):
    got, made = draw(threshold, interval)
    want, asked = by_hand(threshold, interval)
    np.testing.assert_array_equal(made, asked)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert 3 <= made.sum() < STEPS


def test_more_is_skipped_and_the_clip_is_further_away():
    want = sample(
        network, FLOW, SAMPLERS["euler"](), jnp.asarray(X), uniform_timesteps(FLOW, STEPS)
    )
    runs = [draw(threshold) for threshold in (0.0, 0.05, 0.3, 1e9)]
    made, far = [m.sum() for _, m in runs], [np.abs(x - want).mean() for x, _ in runs]
    assert made == sorted(made, reverse=True) and made[0] == STEPS and made[-1] == 3
    assert far[0] < 1e-6 and far == sorted(far)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reuses(sampler):
    one = SAMPLERS[sampler]()
    rows = step_table(FLOW, one, uniform_timesteps(FLOW, STEPS))
    keys = jax.random.split(jax.random.key(0), len(X))
    carry, made = run_steps(
        network, FLOW, one, one.start(jnp.asarray(X)), rows, keys, StepCache(1e9)
    )
    assert made.tolist() == [i in (0, 1, len(made) - 1) for i in range(len(rows["t"]))]
    assert np.isfinite(carry[0]).all() and np.std(carry[0]) > 0.1


def test_a_batch_asks_when_one_of_its_clips_must():
    alone = [draw(0.15, x=np.concatenate([x, x])) for x in (X[:1], X[1:] * 3)]
    _, both = draw(0.15, x=np.concatenate([X[:1], X[1:] * 3]))
    assert alone[0][1].tolist() != alone[1][1].tolist()
    assert both.sum() >= max(made.sum() for _, made in alone)


def test_a_clip_that_stands_still_is_asked_about():
    """0 / 0 is no reason to skip."""
    one = SAMPLERS["euler"]()
    rows = step_table(FLOW, one, uniform_timesteps(FLOW, STEPS))
    carry, made = run_steps(
        lambda x, t: jnp.zeros_like(x),
        FLOW,
        one,
        one.start(jnp.asarray(X)),
        rows,
        None,
        StepCache(0.5),
    )
    assert made.all() and np.isfinite(carry[0]).all()
