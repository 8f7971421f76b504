"""The recurrent mixer: the scan is the loop, the state is carried over, gradients stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.models.mixers.recurrent import HALF_LIVES, STRENGTH, Recurrent, half_lives, linear_scan
from vdx.models.shapes import init_shapes

RNG = np.random.default_rng(0)
WIDTH, FRAMES = 12, 64
X = RNG.normal(size=(2, FRAMES, 1, 3, WIDTH)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dense(p, x):
    return x @ p["kernel"].astype(np.float64) + p["bias"]


def direction_by_loop(p, x, v):
    """Frame by frame, in float64, as the paper writes it."""
    h, out = np.zeros(v[:, 0].shape), []
    for t in range(x.shape[1]):
        a = np.exp(
            -STRENGTH * np.log1p(np.exp(p["decay_scale"])) * sigmoid(dense(p["decay"], x[:, t]))
        )
        h = a * h + np.sqrt(1 - a**2) * sigmoid(dense(p["k"], x[:, t])) * v[:, t]
        out.append(h)
    return np.stack(out, 1)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.fixture(scope="module", params=[False, True], ids=["forward", "both"])
def made(request, randomise):
    """(module, parameters, what it makes of X)."""
    module = Recurrent(heads=1, bidirectional=request.param)
    params = randomise(init_shapes(module, X[:, :1], None))
    run = jax.jit(lambda p, x: module.apply({"params": p}, x, None))
    return module, params, run(params, X)


def test_the_scan_is_the_formula_frame_by_frame(made):
    module, p, got = made
    x = X.astype(np.float64)
    v = dense(p["v"], x)
    h = direction_by_loop(p["forward"], x, v)
    if module.bidirectional:
        h += direction_by_loop(p["backward"], x[:, ::-1], v[:, ::-1])[:, ::-1]
    np.testing.assert_allclose(got, dense(p["out"], gelu(dense(p["q"], x)) * h), atol=1e-5)


@pytest.mark.parametrize("made", [False], indirect=True)
def test_steps_and_windows_are_the_whole(made):
    """A body of jax.lax.scan that keeps one frame, and two windows with a state between them."""
    module, p, want = made
    run = jax.jit(lambda state, x: module.apply({"params": p}, state, x, method="run"))
    state, first = run(module.new_state(X), X[:, :24])
    end, second = run(state, X[:, 24:])
    np.testing.assert_allclose(np.concatenate([first, second], 1), want, atol=1e-5)
    assert np.abs(run(module.new_state(X), X[:, 24:])[1] - second).max() > 0.1

    step = lambda state, x: module.apply({"params": p}, state, x, method="step")
    last, frames = jax.jit(lambda x: jax.lax.scan(step, module.new_state(x), x.swapaxes(0, 1)))(X)
    np.testing.assert_allclose(frames.swapaxes(0, 1), want, atol=1e-5)
    np.testing.assert_allclose(last, end, atol=1e-5)
    assert last.shape == X[:, 0].shape and last.dtype == jnp.float32


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_gradients_are_finite(size, randomise):
    """Also where a gate is shut or open in every bit, and the root's slope without bound."""
    module = Recurrent(heads=1, bidirectional=True)
    params = randomise(init_shapes(module, X, None))
    loss = lambda p, x: jnp.square(module.apply({"params": p}, x, None)).mean()
    grads = jax.jit(jax.grad(loss, (0, 1)))(params, size * X)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_the_scan_runs_either_way():
    a, u = RNG.uniform(size=(2, 1, 5, 1, 1, 3)).astype(np.float32)
    state = RNG.normal(size=(1, 1, 1, 3)).astype(np.float32)
    for reverse in (False, True):
        h, want = state, np.zeros(u.shape)
        for t in sorted(range(5), reverse=reverse):
            h = want[:, t] = a[:, t] * h + u[:, t]
        np.testing.assert_allclose(
            linear_scan(*map(jnp.asarray, (a, u, state)), reverse), want, rtol=1e-5
        )


def test_features_begin_with_these_half_lives():
    rate = np.log1p(np.exp(half_lives(jax.random.key(0), (7,))))
    left = np.exp(-STRENGTH * rate * 0.5 * np.geomspace(*HALF_LIVES, 7))  # gates half open
    np.testing.assert_allclose(left, 0.5, rtol=1e-4)
