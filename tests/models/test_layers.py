"""Layers against their definitions in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from vdx.models.layers import ACTIVATIONS, MLP, EmbedMLP, LayerNorm, RMSNorm, layer_norm
from vdx.models.positions import sinusoidal
from vdx.models.shapes import init_shapes

RNG = np.random.default_rng(0)
X = 3 * RNG.normal(size=(2, 3, 12)) + 1
X32 = jnp.asarray(X, jnp.float32)
DEFINITIONS = {
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: x / 2 * (1 + erf(x / np.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "geglu": lambda x: x[..., : len(x.T) // 2] * DEFINITIONS["gelu_exact"](x[..., len(x.T) // 2 :]),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def close(got, want, tol=2e-6):
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def test_rms_norm():
    scale = RNG.normal(size=12)
    want = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * scale
    close(RMSNorm().apply({"params": {"scale": scale.astype(np.float32)}}, X32), want)


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_layer_norm(eps):
    scale, bias = RNG.normal(size=(2, 12))
    plain = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + eps)
    close(layer_norm(X32, eps), plain)
    params = {"scale": scale.astype(np.float32), "bias": bias.astype(np.float32)}
    close(LayerNorm(eps).apply({"params": params}, X32), plain * scale + bias)


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()])
def test_norms_work_in_float32_and_return_the_type_they_got(norm):
    x = (100 + X).astype(jnp.bfloat16)  # the mean is large against the differences
    params = norm.init(jax.random.key(0), X32)
    got = norm.apply(params, x)
    assert got.dtype == jnp.bfloat16
    want = norm.apply(params, x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_the_mlp(name):
    close(ACTIVATIONS[name](X32), DEFINITIONS[name](X))
    out = 10 if name == "geglu" else 20
    a, b, c, d = (RNG.normal(size=s) / 4 for s in [(12, 20), 20, (out, 12), 12])
    params = {"up": {"kernel": a, "bias": b}, "down": {"kernel": c, "bias": d}}
    params = jax.tree.map(lambda v: v.astype(np.float32), params)
    close(MLP(20, name).apply({"params": params}, X32), DEFINITIONS[name](X @ a + b) @ c + d, 1e-5)


def test_sinusoidal_and_its_mlp(randomise):
    x = np.array([0.0, 0.3, 999.0])
    freqs = np.array([10_000.0 ** (-i / 4) for i in range(4)])
    want = np.concatenate([np.cos(x[:, None] * freqs), np.sin(x[:, None] * freqs)], -1)
    close(sinusoidal(jnp.asarray(x, jnp.float32), 8), want, 1e-4)  # 999 in float32: 3e-5 rad
    layer = EmbedMLP(6, sinusoid=8)
    params = randomise(init_shapes(layer, jnp.ones(1)))
    up, down = params["up"], params["down"]
    h = DEFINITIONS["silu"](want @ up["kernel"] + up["bias"])
    got = layer.apply({"params": params}, jnp.asarray(x, jnp.float32))
    close(got, h @ down["kernel"] + down["bias"], 1e-4)
