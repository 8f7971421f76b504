"""3D convolution against its definition in loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.models import convolution
from vdx.models.convolution import PADDINGS, Conv3D
from vdx.models.shapes import init_shapes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 4, 6, 3)).astype(np.float32)
STRIDES = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 3)]
KERNELS = [(3, 3, 3), (5, 1, 3)]


def conv_by_loop(p, x, kernel, stride, causal, padding, depthwise):
    """Output by output and tap by tap; no array is padded."""
    size = [-(-n // s) for n, s in zip(x.shape[1:4], stride, strict=True)]
    y = np.zeros((len(x), *size, p["bias"].shape[0])) + p["bias"]
    before = [k // 2 for k in kernel]
    if causal:
        before[0] = kernel[0] - 1
    for out, tap in itertools.product(np.ndindex(*size), np.ndindex(*kernel)):
        at = np.multiply(out, stride) + tap - before
        inside = np.clip(at, 0, np.array(x.shape[1:4]) - 1)
        if padding == "edge" or (at == inside).all():
            pixel, weights = x[:, *inside], p["kernel"][tap].astype(np.float64)
            y[:, *out] += pixel * weights[0] if depthwise else pixel @ weights
    return y


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_convolution_is_its_definition(causal, padding, depthwise, randomise):
    features = 3 if depthwise else 4
    fields = [
        dict(kernel=kernel, stride=stride, causal=causal, padding=padding, depthwise=depthwise)
        for kernel in KERNELS
        for stride in STRIDES
    ]
    modules = [Conv3D(features, **one) for one in fields]
    # Their shapes do not depend on the rest.
    plain = (Conv3D(features, one["kernel"], depthwise=depthwise) for one in fields)
    params = [randomise(init_shapes(m, X)) for m in plain]
    run = jax.jit(
        lambda params: [m.apply({"params": p}, X) for m, p in zip(modules, params, strict=True)],
    )
    for one, p, got in zip(fields, params, run(params), strict=True):
        np.testing.assert_allclose(got, conv_by_loop(p, X, **one), atol=2e-6, err_msg=str(one))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_form_for_accelerators_is_that_for_cpus(dtype, monkeypatch):
    """Values and gradients, with strides and padding."""
    kernel = RNG.normal(size=(3, 3, 1, 3, 4)).astype(dtype)

    def found(platform):
        monkeypatch.setattr(convolution, "platform", lambda: platform)

        def loss(x, kernel):
            y = convolution.convolve(x, kernel, (2, 1, 2), ((1, 0), (0, 1))).astype(jnp.float32)
            return jnp.sum(jnp.sin(y)), y

        out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        return out(X.astype(dtype), kernel)

    cpu, other = found("cpu"), found("tpu")
    for a, b in zip(jax.tree.leaves(cpu), jax.tree.leaves(other), strict=True):
        a, b = np.float32(a), np.float32(b)
        assert np.std(a) > 0.1
        tolerance = 1e-5 if dtype == "float32" else 0.02
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(a).max())


def test_a_causal_kernel_of_even_size():
    module = Conv3D(3, (2, 1, 1), causal=True)
    p = {
        "kernel": RNG.normal(size=(2, 1, 1, 3, 3)).astype(np.float32),
        "bias": RNG.normal(size=3).astype(np.float32),
    }
    want = p["bias"] + X @ p["kernel"][1, 0, 0]
    want[:, 1:] += X[:, :-1] @ p["kernel"][0, 0, 0]
    np.testing.assert_allclose(module.apply({"params": p}, X), want, atol=2e-6)


@pytest.mark.parametrize("padding", PADDINGS)
def test_causal_outputs_have_no_gradient_from_later_frames(padding, randomise):
    module = Conv3D(2, (3, 1, 3), (2, 1, 1), causal=True, padding=padding)
    params = randomise(init_shapes(module, X))
    run = lambda x: module.apply({"params": params}, x).sum((0, 2, 3, 4))
    touched = np.abs(jax.jit(jax.jacrev(run))(X)).max((1, 3, 4, 5))  # output, input frame
    assert touched.shape == (3, 5)
    for i, j in np.ndindex(3, 5):
        assert (touched[i, j] > 0) == (0 <= 2 * i - j <= 2), (i, j)


def test_sums_are_float32_in_bfloat16(randomise):
    """A large tap that cancels another: rounded at every tap, what is left would be lost."""
    p = {
        "kernel": np.array([256.0, 1.0, -256.0], np.float32).reshape(3, 1, 1, 1, 1),
        "bias": np.zeros(1, np.float32),
    }
    for depthwise in (False, True):
        module = Conv3D(1, (3, 1, 1), depthwise=depthwise, dtype=jnp.bfloat16)
        got = module.apply({"params": p}, jnp.full((1, 3, 1, 1, 1), 0.75))
        assert got.dtype == jnp.bfloat16 and got[0, 1, 0, 0, 0] == 0.75


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel": (2, 3, 3)},
        {"kernel": (3, 2, 3), "causal": True},
        {"padding": "reflect"},
        {"kernel": (0, 1, 1), "causal": True},
    ],
)
def test_convolutions_that_cannot_be(fields):
    with pytest.raises(ConfigError, match="A convolution of kernel"):
        Conv3D(3, **fields)
