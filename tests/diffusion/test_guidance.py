"""Classifier-free guidance against its formulas."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.diffusion.guidance import Guidance, guided_denoiser
from vdx.parallel import MeshSpec, batch_sharding, constrain
from vdx.types import Ports

B = 3
X = jax.random.normal(jax.random.key(0), (B, 2, 2, 2, 4))
T = jnp.array([0.1, 0.5, 0.9])
COND = Ports(
    tokens=jax.random.normal(jax.random.key(1), (B, 5, 4)),
    vector=jax.random.normal(jax.random.key(2), (B, 4)),
)
NULL = Ports(tokens=jnp.zeros((B, 5, 4)), vector=jnp.ones((B, 4)))


def network(x, t, ports):
    """Nonlinear in all that it is given; every row on its own."""
    mean = lambda a: a[:, None, None, None, :]
    text = mean(ports.tokens.mean(1) * ports.vector)
    return jnp.sin(x + text) * (1 + mean(t[:, None])) + 0.3 * text


class Counting:
    def __init__(self):
        self.batches = []

    def __call__(self, x, t, ports):
        self.batches.append(len(x))
        assert len(t) == len(ports.tokens) == len(x)
        return network(x, t, ports)


def test_one_batched_forward_equals_two():
    counting = Counting()
    got = guided_denoiser(counting, (NULL, COND), Guidance((3.5,)))(X, T)
    a, b = network(X, T, COND), network(X, T, NULL)
    np.testing.assert_allclose(got, b + 3.5 * (a - b), rtol=1e-5, atol=1e-5)
    assert counting.batches == [2 * B]


def test_scale_one_asks_only_the_condition():
    counting = Counting()
    got = guided_denoiser(counting, (None, COND), Guidance())(X.astype(jnp.bfloat16), T)
    assert counting.batches == [B] and got.dtype == jnp.float32
    got = guided_denoiser(counting, (NULL, COND), Guidance((1.0,), rescale=0.7))(X, T)
    np.testing.assert_allclose(got, network(X, T, COND))


def test_scale_zero_is_the_null():
    got = guided_denoiser(network, (NULL, COND), Guidance((0.0,)))(X, T)
    np.testing.assert_allclose(got, network(X, T, NULL), atol=1e-6)


def test_each_condition_has_a_scale_of_its_own():
    """Along a chain of conditions; a scale of 1 is the same as not asking without it."""
    some, counting = COND.replace(tokens=NULL.tokens), Counting()
    got = guided_denoiser(counting, (NULL, some, COND), Guidance((2.0, 3.5)))(X, T)
    a, b, c = (network(X, T, p) for p in (NULL, some, COND))
    np.testing.assert_allclose(got, a + 2.0 * (b - a) + 3.5 * (c - b), rtol=1e-5, atol=1e-5)
    assert counting.batches == [3 * B]
    got = guided_denoiser(network, (NULL, some, COND), Guidance((1.0, 3.5)))(X, T)
    np.testing.assert_allclose(
        got, guided_denoiser(network, (some, COND), Guidance((3.5,)))(X, T), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="2 guidance scales"):
        guided_denoiser(network, (NULL, COND), Guidance((2.0, 3.5)))


def test_rescale_as_published():
    a, b = (np.asarray(network(X, T, p), np.float64) for p in (COND, NULL))
    plain = b + 4.0 * (a - b)
    for phi in (0.3, 1.0):
        got = guided_denoiser(network, (NULL, COND), Guidance((4.0,), rescale=phi))(X, T)
        for i in range(B):
            factor = a[i].std() / plain[i].std()
            want = phi * plain[i] * factor + (1 - phi) * plain[i]
            np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(got).std((1, 2, 3, 4)), a.std((1, 2, 3, 4)), rtol=1e-4)


def test_interval_is_per_sample_and_includes_its_ends():
    got = guided_denoiser(
        network, (NULL, COND), Guidance((4.0,), rescale=0.5, interval=(0.2, 0.5))
    )(X, T)
    full = guided_denoiser(network, (NULL, COND), Guidance((4.0,), rescale=0.5))(X, T)
    plain = network(X, T, COND)
    np.testing.assert_allclose(got[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(got[1], full[1], atol=1e-5)
    np.testing.assert_allclose(got[2], plain[2], atol=1e-5)
    assert not np.allclose(full[0], plain[0], atol=1e-2)


def test_errors():
    with pytest.raises(ValueError, match="same signals"):
        guided_denoiser(network, (Ports(tokens=NULL.tokens), COND), Guidance((2.0,)))
    with pytest.raises(ConfigError, match="interval"):
        Guidance(interval=(0.9, 0.1))
    with pytest.raises(ConfigError, match="rescale"):
        Guidance(rescale=1.5)


def test_the_questions_of_a_clip_stay_where_it_is():
    """On a mesh that splits the batch nothing is sent to ask, nor to put the answers together."""
    with jax.set_mesh(MeshSpec(data=8).make()):

        def ask(x, t, null, cond):
            split = lambda x: constrain(x, "b t h w c")
            return guided_denoiser(
                lambda *a: split(network(split(a[0]), *a[1:])), (null, cond), Guidance((3.5,))
            )(x, t)

        args = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((8, *a.shape[1:]), a.dtype), (X, T, NULL, COND)
        )
        lie = batch_sharding(jax.sharding.get_mesh())
        program = jax.jit(ask, in_shardings=lie, out_shardings=lie)
        assert not re.search(
            "all-|collective-|reduce-scatter", program.lower(*args).compile().as_text()
        )
