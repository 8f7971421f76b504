"""Every backend of attention against its definition, on one device and on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.build import ConfigError
from vdx.models.attend import BACKENDS, Ask, attend

RNG = np.random.default_rng(0)
# case -> (queries, keys, head width, what hides)
CASES = {
    "plain": (40, 50, 128, {}),
    "several blocks": (1027, 90, 64, {}),
    "mask": (530, 140, 64, {"mask": RNG.random((2, 140)) < 0.7}),
    "mask for all": (70, 90, 64, {"mask": RNG.random((1, 90)) < 0.7}),
    "mask of each": (530, 90, 64, {"mask": RNG.random((2, 530, 90)) < 0.7}),
    "causal": (530, 530, 64, {"causal": True}),
    "causal, masked": (140, 90, 64, {"causal": True,
                                     "mask": np.arange(90) < np.array([[60], [8]])}),
    "scale": (40, 50, 64, {"scale": 0.3}),
    "bias": (40, 50, 64, {"bias": RNG.normal(size=(1, 2, 40, 50)).astype(np.float32)}),
}


def arrays(queries, keys, width, heads=2, batch=(2,), dtype=np.float32):
    """q, k, v and a cotangent."""
    return tuple(jnp.asarray(RNG.normal(size=(*batch, n, heads, width)), dtype)
                 for n in (queries, keys, keys, queries))


def definition(q, k, v, mask=None, bias=0.0, scale=None, causal=False):
    """[b s n d], or with more of the batch after b, in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    x = jnp.einsum("...qnd,...snd->...nqs", q, k) * scale + bias
    if mask is not None:
        x = jnp.where(mask[:, None] if mask.ndim == 3 else mask[:, None, None], x, -jnp.inf)
    if causal:
        x = jnp.where(jnp.tri(*x.shape[-2:], dtype=bool), x, -jnp.inf)
    return jnp.einsum("...nqs,...snd->...qnd", jax.nn.softmax(x), v)


def with_gradients(f):
    def run(q, k, v, dy):
        y, back = jax.vjp(f, q, k, v)
        return y, *back(dy)
    return run


def difference(got, want):
    """The largest of the relative errors (in norm) of values and gradients."""
    norm = lambda a: np.linalg.norm(np.asarray(a, np.float32))
    return max(norm(np.asarray(g, np.float32) - np.asarray(w, np.float32)) / norm(w)
               for g, w in zip(got, want, strict=True))


def ask_of(case, **changes):
    queries, keys, width, hides = CASES[case]
    mask = hides.get("mask")
    return Ask(**{"queries": queries, "keys": keys, "width": width,
                  "mask": 0 if mask is None else mask.ndim, "bias": "bias" in hides,
                  "causal": "causal" in hides, **changes})


HERE = [name for name in BACKENDS if name != "cudnn"]       # which needs a GPU


@pytest.fixture(scope="module")
def wanted(quick):
    """wanted(case): (q, k, v, dy), (y, dq, dk, dv)."""
    @functools.cache
    def make(case):
        queries, keys, width, hides = CASES[case]
        args = arrays(queries, keys, width)
        run = with_gradients(functools.partial(definition, **hides))
        return args, jax.jit(run, compiler_options=quick)(*args)
    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", HERE)
def test_backends_are_the_definition(backend, case, wanted, quick):
    hides = CASES[case][3]
    args, want = wanted(case)
    run = with_gradients(lambda *a: attend(*a, backend=backend, **hides))
    if BACKENDS[backend].lacks(ask_of(case)):
        with pytest.raises(ConfigError, match=f"model.attention = '{backend}'.*'auto' takes"):
            run(*args)
    else:
        got = jax.jit(run, compiler_options=quick)(*args)
        assert difference(got, want) < 5e-6
