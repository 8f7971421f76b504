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
def compiled(sampler, interval):
    """Jitted: clips, a threshold and keys -> what run_steps returns."""
    one = SAMPLERS[sampler]()
    rows = step_table(FLOW, one, uniform_timesteps(FLOW, STEPS))
    return jax.jit(
        lambda x, threshold, keys: run_steps(
            network, FLOW, one, one.start(x), rows, keys, StepCache(threshold, interval)
        )
    )


def draw(threshold, interval=(0.0, 1.0), sampler="euler", x=X, keys=None):
    """(clips, which evaluations were made for each clip)"""
    carry, made = compiled(sampler, interval)(x, threshold, keys)
    return np.asarray(carry[0]), np.asarray(made)


def by_hand(threshold, interval, clip):
    """Euler's method of one clip, step by step."""
    times, x, made = uniform_timesteps(FLOW, STEPS), clip[None].astype(np.float64), []
    inside = (times >= interval[0]) & (times <= interval[1])
    size = lambda a: np.abs(a).mean()
    last_x = last = rate = None
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        ask = (
            i < 2
            or i == STEPS - 1
            or inside[i] != inside[i - 1]
            or rate * size(x - last_x) / size(last) >= threshold
        )
        made.append(ask)
        if ask:
            answer = np.asarray(network(x, np.full(1, t)), np.float64)
            if last is not None:
                rate = size(answer - last) / size(x - last_x)
            last_x, last = x, answer
        else:
            answer = last + x - last_x
        x = x + (s - t) * answer
    return x[0], made


@pytest.mark.parametrize(
    ("threshold", "interval"),
    [(0.15, (0.0, 1.0)), (0.3, (0.0, 1.0)), (0.3, (0.3, 0.6)), (1e9, (0.0, 1.0))],
)
def test_the_rule(threshold, interval):
    clips = np.concatenate([X[:1], X[1:] * 3])
    got, made = draw(threshold, interval, x=clips)
    for i, clip in enumerate(clips):
        want, asked = by_hand(threshold, interval, clip)
        np.testing.assert_array_equal(made[:, i], asked)
        np.testing.assert_allclose(got[i], want, atol=1e-4)
        assert 3 <= made[:, i].sum() < STEPS


def test_more_is_skipped_and_the_clip_is_further_away():
    want = sample(
        network, FLOW, SAMPLERS["euler"](), jnp.asarray(X), uniform_timesteps(FLOW, STEPS)
    )
    runs = [draw(threshold) for threshold in (0.0, 0.05, 0.3, 1e9)]
    made, far = [m.any(1).sum() for _, m in runs], [np.abs(x - want).mean() for x, _ in runs]
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
    assert made.shape == (len(rows["t"]), len(X))
    assert made.all(1).tolist() == [i in (0, 1, len(made) - 1) for i in range(len(made))]
    assert made.any(1).tolist() == made.all(1).tolist()
    assert np.isfinite(carry[0]).all() and np.std(carry[0]) > 0.1


@pytest.mark.parametrize(("sampler", "threshold"), [("dpmpp_2m", 0.15), ("ddpm", 0.8)])
def test_a_clip_is_the_same_alone_and_in_any_batch(sampler, threshold):
    """Its neighbours change neither what is skipped nor the result."""
    clips = np.concatenate([X[:1], X[1:] * 3, X[:1] / 5])
    keys = jax.random.split(jax.random.key(0), len(clips))

    def run(order):
        return draw(threshold, (0.0, 1.0), sampler, clips[order], keys[jnp.array(order)])

    alone = [run([i]) for i in range(len(clips))]
    decisions = [made[:, 0].tolist() for _, made in alone]
    assert any(made != decisions[0] for made in decisions), "the clips skip the same"
    for order in ([0, 1, 2], [2, 0, 0], [1, 1, 2]):
        x, made = run(order)
        for place, i in enumerate(order):
            assert made[:, place].tolist() == decisions[i]
            np.testing.assert_allclose(x[place], alone[i][0][0], atol=1e-5)


def test_the_network_runs_only_where_a_clip_needs_it():
    runs = []
    counted = lambda x, t: (jax.debug.callback(lambda: runs.append(1)), network(x, t))[1]
    one = SAMPLERS["euler"]()
    rows = step_table(FLOW, one, uniform_timesteps(FLOW, STEPS))
    x = jnp.concatenate([X[:1], X[1:] * 3])
    _, made = run_steps(counted, FLOW, one, one.start(x), rows, None, StepCache(0.15))
    jax.effects_barrier()
    assert len(runs) == np.asarray(made).any(1).sum() < STEPS


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
