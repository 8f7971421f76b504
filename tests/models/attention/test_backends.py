"""Every backend of attention against its definition, on one device and on several."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.models.attention.backends import (
    BACKENDS,
    CONTEXTS,
    AttentionSpec,
    attend,
    select_backend,
    selected_backends,
)
from vdx.parallel import AXES, MeshSpec, platform

RNG = np.random.default_rng(0)
# case -> (queries, keys, head width, what hides)
CASES = {
    "plain": (40, 50, 128, {}),
    "several blocks": (1027, 90, 64, {}),
    "mask": (530, 140, 64, {"mask": RNG.random((2, 140)) < 0.7}),
    "mask for all": (70, 90, 64, {"mask": RNG.random((1, 90)) < 0.7}),
    "mask of each": (530, 90, 64, {"mask": RNG.random((2, 530, 90)) < 0.7}),
    "causal": (530, 530, 64, {"causal": True}),
    "causal, masked": (
        140,
        90,
        64,
        {"causal": True, "mask": np.arange(90) < np.array([[60], [8]])},
    ),
    "scale": (40, 50, 64, {"scale": 0.3}),
    "bias": (40, 50, 64, {"bias": RNG.normal(size=(1, 2, 40, 50)).astype(np.float32)}),
}


def arrays(queries, keys, width, heads=2, batch=(2,), dtype=np.float32):
    """q, k, v and a cotangent."""
    return tuple(
        jnp.asarray(RNG.normal(size=(*batch, n, heads, width)), dtype)
        for n in (queries, keys, keys, queries)
    )


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
        y, reshard_to_frames = jax.vjp(f, q, k, v)
        return y, *reshard_to_frames(dy)

    return run


def difference(got, want):
    """The largest of the relative errors (in norm) of values and gradients."""
    norm = lambda a: np.linalg.norm(np.asarray(a, np.float32))
    return max(
        norm(np.asarray(g, np.float32) - np.asarray(w, np.float32)) / norm(w)
        for g, w in zip(got, want, strict=True)
    )


def ask_of(case, **changes):
    queries, keys, width, hides = CASES[case]
    mask = hides.get("mask")
    return AttentionSpec(
        **{
            "queries": queries,
            "keys": keys,
            "width": width,
            "mask": 0 if mask is None else mask.ndim,
            "bias": "bias" in hides,
            "causal": "causal" in hides,
            **changes,
        }
    )


FEW = ("several blocks", "mask", "mask of each", "bias")  # the rest is slow, but for one of ours
HERE = [name for name in BACKENDS if name != "cudnn"]  # which needs a GPU


@pytest.fixture(scope="module")
def wanted():
    """wanted(case): (q, k, v, dy), (y, dq, dk, dv)."""

    @functools.cache
    def make(case):
        queries, keys, width, hides = CASES[case]
        args = arrays(queries, keys, width)
        run = with_gradients(functools.partial(definition, **hides))
        return args, jax.jit(run)(*args)

    return make


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(
            backend,
            case,
            marks=[]
            if case in FEW or (backend, case) == ("blockwise", "causal, masked")
            else pytest.mark.slow,
        )
        for backend in HERE
        for case in CASES
    ],
)
def test_backends_are_the_definition(backend, case, wanted):
    hides = CASES[case][3]
    args, want = wanted(case)
    run = with_gradients(lambda *a: attend(*a, backend=backend, **hides))
    if BACKENDS[backend].unsupported(ask_of(case)):
        with pytest.raises(ConfigError, match=f"model.attention = '{backend}'.*'auto' takes"):
            run(*args)
    else:
        got = jax.jit(run)(*args)
        assert difference(got, want) < 5e-6


@pytest.mark.parametrize("backend", HERE)
def test_in_bfloat16_they_round_no_more_than_the_plain_one(backend, wanted):
    args, want = wanted("plain")
    half = [a.astype(jnp.bfloat16) for a in args]
    got = jax.jit(with_gradients(lambda *a: attend(*a, backend=backend)))(*half)
    assert all(g.dtype == jnp.bfloat16 for g in got)
    assert difference(got, want) < 0.012


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_more_of_the_batch_may_follow_b(backend):
    """As places do in attention over time; a mask is then the same for all of a clip."""
    q, k, v, _ = arrays(9, 9, 8, batch=(2, 3, 2))
    mask = RNG.random((2, 9, 9)) < 0.6
    got = jax.jit(lambda *a: attend(*a, mask, backend=backend))(q, k, v)
    one = jax.jit(definition)
    for clip in range(2):
        for place in np.ndindex(3, 2):
            args = (np.asarray(a)[clip][place][None] for a in (q, k, v))
            np.testing.assert_allclose(
                np.asarray(got)[clip][place][None], one(*args, mask[clip : clip + 1]), atol=2e-6
            )


@pytest.mark.parametrize("mask", [True, False])
def test_cudnn_is_given_what_it_takes(mask, monkeypatch):
    """The call, on the plain implementation: a GPU is not at hand."""
    plain, asked = jax.nn.dot_product_attention, []

    def stand_in(q, k, v, bias, mask, *, implementation, **rest):
        asked.append((implementation, bias, None if mask is None else mask.shape))
        return plain(q, k, v, bias, mask, **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr("vdx.models.attention.backends.platform", lambda: "gpu")
    q, k, v, _ = arrays(130, 140, 64, dtype=jnp.bfloat16)
    seen = jnp.asarray(RNG.random((2, 140)) < 0.7) if mask else None
    got = jax.jit(attend)(q, k, v, seen)
    assert asked == [("cudnn", None, (2, 1, 130, 140) if mask else None)]
    want = jax.jit(definition)(*(a.astype(jnp.float32) for a in (q, k, v)), seen)
    assert difference([got], [want]) < 0.01


BIG = AttentionSpec(4096, 4096, 64, "bfloat16")


@pytest.mark.parametrize(
    ("platform", "changes", "name"),
    [
        ("cpu", {}, "blockwise"),
        ("gpu", {}, "cudnn"),
        ("tpu", {}, "splash"),
        ("other", {}, "xla"),
        ("tpu", {"queries": 64, "keys": 256}, "xla"),
        ("cpu", {"queries": 64, "keys": 64}, "xla"),
        ("tpu", {"bias": True}, "xla"),
        ("tpu", {"mask": 2}, "splash"),
        ("tpu", {"mask": 3}, "blockwise"),
        ("tpu", {"width": 512}, "splash"),
        ("gpu", {"dtype": "float32"}, "blockwise"),
        ("gpu", {"width": 512}, "blockwise"),
        ("gpu", {"width": 60}, "blockwise"),
        ("gpu", {"bias": True}, "xla"),
        ("gpu", {"mask": 2}, "cudnn"),
        ("gpu", {"mask": 2, "keys": 77}, "blockwise"),
    ],
)
def test_auto_takes_what_suits_the_device_and_can_do_it(platform, changes, name):
    assert select_backend(AttentionSpec(**{**vars(BIG), "platform": platform, **changes})) == name


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("cudnn", {}, "needs a GPU"),
        ("cudnn", {"platform": "gpu", "dtype": "float32"}, "bfloat16"),
        ("cudnn", {"platform": "gpu", "bias": True}, "no bias"),
        ("splash", {"mask": 3}, "one mask"),
        ("blockwize", {}, "Did you mean 'blockwise'"),
    ],
)
def test_what_a_backend_cannot_do(backend, changes, message):
    with pytest.raises(ConfigError, match=message):
        select_backend(AttentionSpec(**{**vars(BIG), **changes}), backend)


def test_the_platform_is_that_of_the_mesh():
    abstract_device = jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 1), AXES, abstract_device=abstract_device)
    assert platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"
    assert platform() == "cpu"


def test_what_was_selected_can_be_listed():
    one = jax.ShapeDtypeStruct((1, 1234, 2, 16), jnp.bfloat16)
    jax.eval_shape(attend, one, one, one)
    assert "1234 queries, 1234 keys of 16 in bfloat16: blockwise" in selected_backends()


def test_blockwise_never_holds_all_scores():
    """Forward and backward at 8,192 tokens and 4 heads, by the compiler's account: what is kept
    is a few arrays of the size of q, and not the scores, which are 1 GiB."""
    one = jax.ShapeDtypeStruct((1, 8192, 4, 64), jnp.float32)
    run = jax.jit(with_gradients(lambda *a: attend(*a, backend="blockwise")))
    memory = run.lower(one, one, one, one).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**30 / 8


MESHES = {
    "context": (MeshSpec(data=2, context=4), (2, 32, 4, 8)),
    "ragged": (MeshSpec(data=2, context=4), (2, 27, 3, 8)),  # neither heads nor tokens divide
    "all axes": (MeshSpec(data=1, fsdp=2, context=2, tensor=2), (2, 30, 6, 8)),
    "one clip": (MeshSpec(data=2, context=4), (1, 18, 2, 8)),
}


@pytest.mark.parametrize(
    "case",
    [name if name == "ragged" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
@pytest.mark.parametrize("context", CONTEXTS)
def test_on_several_devices_it_is_that_of_one(context, case):
    """Values and gradients, with and without a mask."""
    spec, (b, tokens, heads, width) = MESHES[case]
    args = arrays(tokens, tokens, width, heads, (b,))
    mask = np.arange(tokens) < RNG.integers(1, tokens, (b, 1)) if case != "all axes" else None
    want = jax.jit(with_gradients(lambda *a: definition(*a, mask)))(*args)
    with jax.set_mesh(spec.make()):
        run = with_gradients(lambda *a: attend(*a, mask, backend="blockwise", context=context))
        program = jax.jit(run).lower(*args).compile()
        assert difference(program(*args), want) < 2e-6
    text = program.as_text()
    assert ("all-to-all" in text) == (context == "ulysses")
    assert ("collective-permute" in text) == (context == "ring")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "batch"),
    [("splash", (2,)), ("splash", (2, 4)), ("blockwise", (4, 2, 3))],
)
def test_kernels_attend_for_their_own_share(backend, batch):
    args = arrays(20, 20, 64, 2, batch)
    mask = RNG.random((1, 20)) < 0.7
    want = jax.jit(with_gradients(lambda *a: definition(*a, mask[:, None])))(*args)
    with jax.set_mesh(MeshSpec(data=2, context=2, tensor=2).make()):
        run = with_gradients(lambda *a: attend(*a, mask, backend=backend))
        assert difference(jax.jit(run)(*args), want) < 5e-6


def test_tokens_that_do_not_see_the_same_are_gathered():
    q = jnp.zeros((1, 8, 2, 8))
    with (
        jax.set_mesh(MeshSpec(data=2, context=4).make()),
        pytest.raises(ConfigError, match=r"'ring' is for tokens.*'gather' can"),
    ):
        attend(q, q, q, causal=True, context="ring")


AHEAD = r"""
import functools, os, sys
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost",
                  TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from vdx.models.attention.backends import attend, selected_backends
from vdx.parallel import BATCH, MeshSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
for sizes, shape, context in [
    (dict(fsdp=4), (4, 2304, 4, 128), "gather"),
    (dict(context=4), (1, 2304, 4, 64), "ulysses"),
    (dict(context=4), (1, 2304, 4, 64), "ring"),
    (dict(fsdp=4), (8, 300, 2, 72), "gather"),
    (dict(fsdp=4), (4, 1560, 1, 384), "gather"),
]:
    mesh = MeshSpec(**{"data": 1, **sizes}).make(devices)
    one = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(
        BATCH, "context" if "context" in sizes else None)))
    with jax.set_mesh(mesh):
        f = functools.partial(attend, context=context)
        run = lambda q, k, v, dy: jax.vjp(f, q, k, v)[1](dy)
        text = jax.jit(run).lower(one, one, one, one).compile().as_text()
    moved = [name for name in ("all-to-all", "collective-permute") if name in text]
    print(*shape, context, text.count('"tpu_custom_call"'), *moved, flush=True)
print(*selected_backends(), sep="\n")
"""


@pytest.mark.slow
def test_ahead_of_time_for_a_tpu_it_is_a_kernel():
    """Splash attention forward, and two kernels backward, of every shape of head that is in use."""
    pytest.importorskip("libtpu")
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", AHEAD], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "4 2304 4 128 gather 3",
        "1 2304 4 64 ulysses 3 all-to-all",
        "1 2304 4 64 ring 0 collective-permute",
        "8 300 2 72 gather 3",
        "4 1560 1 384 gather 3",
    ]
    assert all(line.endswith("splash") for line in lines[5:])
