"""Adapters of kernels act as the merged weights would, and nothing else is touched."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.experiment import Experiment
from vdx.models.adapters.lora import (
    Lora,
    WeightDelta,
    adapt,
    concat_factors,
    dense_kernels,
    merge_factors,
)
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes
from vdx.parallel import MeshSpec, param_shardings, put_batch, replicated
from vdx.train.state import init_state, state_shardings
from vdx.train.step import make_train_step

BACKBONE = {
    "name": "transformer",
    "channels": 4,
    "width": 48,
    "depth": 4,
    "heads": 2,
    "mlp_ratio": 2.0,
    "pattern": ("full", "time"),
    "remat": "full",
}
SIGNALS: dict[str, Any] = {
    "embeddings": {"features": 16},
    "fps": {},
    "concat": {"channels": 8},
    "image_tokens": {"features": 20},
    "control": {"channels": 12},
}
EVERY = Lora(rank=3, targets=("kernel$",))
B, T, H, W = 2, 2, 4, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


BATCH = {
    "text": normal(B, 5, 16),
    "text_mask": np.ones((B, 5), bool),
    "concat": normal(B, T, H, W, 8),
    "image_tokens": normal(B, 7, 20),
    "control": normal(B, T, H, W, 12),
    "fps": np.full(B, 8, np.float32),
}
X, TIME = normal(B, T, H, W, 4), np.array([37.3, 803.0], np.float32)


@pytest.fixture(scope="module")
def model():
    return Denoiser(BACKBONE, SIGNALS)


@pytest.fixture(scope="module")
def kernels(model):
    return dense_kernels(model.new_params)


@pytest.fixture(scope="module")
def params(model, randomise):
    return randomise(new_shapes(model))


def runner(model):
    """Jitted: parameters, with or without adapters -> prediction."""
    keep = model.drop_masks(B, False)
    return jax.jit(lambda p: model.run(p, X, TIME, BATCH, keep, method="train_view"))


@pytest.fixture(scope="module")
def run(model):
    return runner(model)


def drawn(lora: Lora, kernels, seed=0):
    """Factors of which neither is zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: lora.new_factors(jax.random.key(0), kernels))
    return jax.tree.map(
        lambda s: (
            rng.standard_normal(s.shape).astype(np.float32) / np.float32(np.sqrt(s.shape[-2]))
        ),
        shapes,
    )


# What they do to a network.


def test_new_adapters_change_no_bit(run, params, kernels):
    new = EVERY.new_factors(jax.random.key(0), kernels)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(new)} == {"float32"}
    a = new["network"]["layers"]["block_1"]["time"]["q"]["lora_a"]
    assert a.shape == (2, 48, 3) and 0.9 < np.abs(a).max() * np.sqrt(48) <= 1 and a.std() > 0.05
    want, got = run(params), run(EVERY.combine(params, new))
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_adapters_act_as_merged_kernels(run, params, kernels):
    """In every dense layer there is: scanned, control blocks, embeddings of every signal."""
    factors = drawn(EVERY, kernels)
    lora = dataclasses.replace(EVERY, alpha=1.2)
    got = run(lora.combine(params, factors))
    np.testing.assert_allclose(got, run(merge_factors(params, factors, 0.4)), atol=1e-5)
    assert np.abs(got - run(params)).max() > 0.1


def test_every_adapter_acts(run, params, kernels):
    """Each alone, or a layer that reads none would go unnoticed."""
    factors, want = flatten_dict(drawn(EVERY, kernels), sep="/"), run(params)
    assert len(factors) == 2 * len(kernels) > 60
    for path in kernels:
        layer = path.removesuffix("kernel")
        alone = {k: v if k.startswith(layer) else np.zeros_like(v) for k, v in factors.items()}
        got = run(EVERY.combine(params, unflatten_dict(alone, sep="/")))
        assert np.abs(got - want).max() > 1e-4, path


@pytest.mark.slow
def test_several_at_once(run, params, kernels):
    """Of other ranks, in other places and of other strengths: the sum of all that they do."""
    one = WeightDelta(drawn(EVERY, kernels), weight=0.5)
    some = Lora(rank=5, targets=("block_0/.*kernel$",))
    two = WeightDelta(
        drawn(some, some.select_kernels(kernels), 1), {"network/table": normal(2, 48)}, -0.7
    )
    want = merge_factors(merge_factors(params, one.factors, 0.5), two.factors, -0.7)
    want["network"]["table"] = params["network"]["table"] - 0.7 * two.deltas["network/table"]
    np.testing.assert_allclose(run(adapt(params, one, two)), run(want), atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        adapt(params, one, two, merge=True),
        want,
    )
    trained = dataclasses.replace(EVERY, alpha=1.5).combine(params, one.factors)  # scale 0.5
    np.testing.assert_allclose(run(adapt(trained, two)), run(want), atol=1e-5)
    with pytest.raises(ValueError, match="This network has no network/tabel"):
        adapt(params, WeightDelta({}, {"network/tabel": np.zeros(2)}))


def test_joined_ranks():
    one, two = ({"q": {"lora_a": normal(2, 6, r), "lora_b": normal(2, r, 4)}} for r in (1, 3))
    both = concat_factors((one, 2.0), (two, 1.0))["q"]
    assert both["lora_a"].shape == (2, 6, 4) and both["lora_b"].shape == (2, 4, 4)
    np.testing.assert_allclose(
        both["lora_a"] @ both["lora_b"],
        2 * one["q"]["lora_a"] @ one["q"]["lora_b"] + two["q"]["lora_a"] @ two["q"]["lora_b"],
        atol=1e-5,
    )


@pytest.mark.slow
def test_in_bfloat16_they_add_to_what_the_layer_gives(run, params, kernels):
    half = Denoiser({**BACKBONE, "dtype": "bfloat16"}, SIGNALS)
    adapted = EVERY.combine(params, drawn(EVERY, kernels))
    want, got = run(adapted), runner(half)(adapted)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


def arrays_of(jaxpr):
    """Shapes of all values of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield from ((equation.primitive.name, v.aval.shape) for v in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


@pytest.mark.slow
def test_training_makes_no_array_of_a_kernels_size(model, params, kernels):
    """Neither W + A B nor a gradient of W: the products of the program are all smaller."""
    odd = Denoiser({**BACKBONE, "width": 52, "mlp_ratio": 3.0}, SIGNALS)  # no other such sizes
    shapes = new_shapes(odd)
    found = EVERY.select_kernels(dense_kernels(odd.new_params))
    factors = jax.eval_shape(lambda: EVERY.new_factors(jax.random.key(0), found))
    keep = odd.drop_masks(B, False)

    def loss(factors, base):
        p = EVERY.combine(base, factors)
        return jnp.square(odd.run(p, X, TIME, BATCH, keep, method="train_view")).mean()

    def products(*argnums):
        program = jax.make_jaxpr(jax.grad(loss, argnums))(factors, shapes).jaxpr
        return {shape for name, shape in arrays_of(program) if name == "dot_general"}

    sizes = {k.shape[-2:] for k in found.values()}
    assert not products(0) & sizes
    assert products(1) & sizes >= {(52, 52), (52, 156), (156, 52)}  # the test would see it


# Dropout.


class One(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="d", use_bias=False)(x)


def test_dropout_drops_what_a_reads():
    lora = Lora(rank=1, dropout=0.25, alpha=2.0)
    base = {"d": {"kernel": jnp.zeros((8, 1))}}
    factors = {"d": {"lora_a": jnp.ones((8, 1)), "lora_b": jnp.ones((1, 1))}}
    call = lambda key: lora.combine(base, factors, key).apply(
        One(), jnp.ones((4000, 8)), method="__call__"
    )[:, 0]
    one, other = call(jax.random.key(0)), call(jax.random.key(1))
    kept = np.asarray(one) * 0.75 / 2
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-5)  # a number of ones
    assert abs(kept.mean() - 6) < 0.1 and abs(kept.var() - 8 * 0.25 * 0.75) < 0.15
    assert np.abs(one - other).max() > 1
    np.testing.assert_array_equal(one, call(jax.random.key(0)))
    np.testing.assert_array_equal(call(None), 16.0)  # not while sampling


def test_layers_of_a_scan_drop_differently():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x, nn.Dense(1, name="d", use_bias=False)(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Layer),
                variable_axes={"params": 0, "lora": 0},
                length=3,
                split_rngs={"params": True, "lora": True},
                in_axes=nn.broadcast,
            )
            return layers(name="layers")(x, None)[1]

    base = {"layers": {"d": {"kernel": jnp.zeros((3, 8, 1))}}}
    factors = {"layers": {"d": {"lora_a": jnp.ones((3, 8, 1)), "lora_b": jnp.ones((3, 1, 1))}}}
    y = (
        Lora(rank=1, dropout=0.5)
        .combine(base, factors, jax.random.key(0))
        .apply(Net(), jnp.ones((50, 8)), method="__call__")[..., 0]
    )
    assert np.abs(y[0] - y[1]).max() > 0 and np.abs(y[1] - y[2]).max() > 0


def test_layers_of_the_transformer_drop(randomise):
    plain = Denoiser({**BACKBONE, "depth": 2}, {"embeddings": {"features": 16}})
    params = randomise(new_shapes(plain))
    lora, run = (
        Lora(rank=3, dropout=0.5, targets=("network/layers/block_1/time/v",)),
        runner(plain),
    )
    factors = drawn(lora, lora.select_kernels(dense_kernels(plain.new_params)))
    one, other = (run(lora.combine(params, factors, jax.random.key(i))) for i in (0, 1))
    assert np.abs(one - other).max() > 1e-3


# The section of a config.


def test_targets(kernels):
    selected = set(Lora().select_kernels(kernels))
    assert {
        "network/layers/block_0/full/q/kernel",
        "network/layers/block_1/cross/image_v/kernel",
        "network/layers/block_1/mlp/down/kernel",
        "network/layers/control/full/out/kernel",
    } <= selected
    assert all(path.startswith("network/layers/") for path in selected)
    assert not any("hint" in path for path in selected) and len(selected) == 3 * 12
    assert set(Lora(targets=("time/q/", "^network/patch")).select_kernels(kernels)) == {
        "network/layers/block_1/time/q/kernel",
        "network/patch/kernel",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("block_9",)}, r"'block_9' is found in no kernel.*\n  conditioning/"),
        ({"targets": ("network/patch/kernle",)}, r"Did you mean 'network/patch/kernel'"),
        ({"targets": ()}, "at least one kernel"),
        ({"rank": 0}, r"lora\.rank = 0 is out of range, expected int >= 1"),
        ({"dropout": 1.0}, r"lora\.dropout = 1\.0 is out of range, expected float in \[0, 1\)"),
    ],
)
def test_sections_that_cannot_be_meant(fields, message, kernels):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Lora(**fields).select_kernels(kernels)


def test_a_convolution_is_no_target():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="out")(nn.Conv(4, (3,), name="q")(x))

    kernels = dense_kernels(lambda key: Net().init(key, jnp.ones((1, 5, 3)))["params"])
    assert set(kernels) == {"out/kernel"}


# The mesh.


def test_factors_are_sharded_as_their_kernels(kernels):
    mesh = MeshSpec(data=1, fsdp=4, tensor=2).make()
    lora = Lora(rank=3, targets=("block_0/full", "modulation"))
    shapes = jax.eval_shape(
        lambda: lora.new_factors(jax.random.key(0), lora.select_kernels(kernels))
    )
    where = jax.tree.map(lambda s: s.spec, param_shardings(mesh, shapes))["network"]
    full = where["layers"]["block_0"]["full"]
    assert full["q"] == {"lora_a": P(None, "fsdp", None), "lora_b": P(None, None, "tensor")}
    assert full["out"] == {"lora_a": P(None, "tensor", None), "lora_b": P(None, None, "fsdp")}
    assert where["modulation"] == {"lora_a": P("fsdp", None), "lora_b": P(None, None)}


@pytest.fixture(scope="module")
def trained(randomise):
    """experiment, frozen weights, adapters of which none is zero, a batch."""
    made = Experiment(
        resolve(
            "configs/wan21_t2v_1p3b_lora.py:smoke",
            [
                "--config.model.backbone.dtype=float32",
                "--config.model.backbone.remat=none",
                "--config.model.signals.embeddings.length=None",
                "--config.lora.dropout=0.1",
                "--config.lora.targets=['kernel$']",
                "--config.optim.warmup_steps=1",
            ],
        )
    )
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float16)
    batch = {
        "latents": array(8, 2, 4, 4, 4),
        "text": array(8, 5, 16),
        "text_mask": np.ones((8, 5), bool),
        "key": np.array(["clip"] * 8),
    }
    return made, randomise(made.shapes), drawn(made.lora, made.kernels), batch


def two_steps(trained, devices, **sizes):
    """Losses, the first gradient, the state and the frozen weights after two steps."""
    made, frozen, factors, batch = trained
    mesh = MeshSpec(**{"data": 1, **sizes}).make(devices)
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (grads, grads),
    )
    with jax.set_mesh(mesh):
        new = functools.partial(init_state, tx=optax.chain(keep, made.tx), seed=3)
        shardings = state_shardings(mesh, jax.eval_shape(new, factors))
        state = jax.jit(new, out_shardings=shardings)(factors)
        frozen = jax.device_put(frozen, param_shardings(mesh, frozen))
        step = jax.jit(
            make_train_step(made.objective, optax.chain(keep, made.tx), 0.99),
            donate_argnums=0,
            out_shardings=(shardings, replicated(mesh)),
        )
        losses, gradient = [], None
        for _ in range(2):
            state, metrics = step(state, put_batch(mesh, batch), frozen)
            losses.append(float(metrics["loss"]))
            gradient = gradient or jax.device_get(state.opt_state[0])
    assert step._cache_size() == 1
    return losses, gradient, state, frozen


@pytest.mark.slow
def test_eight_devices_are_one(trained):
    losses, gradient, *_ = two_steps(trained, jax.devices()[:1])
    many, spread, state, frozen = two_steps(trained, jax.devices(), fsdp=4, tensor=2)
    np.testing.assert_allclose(many, losses, rtol=1e-6)
    assert losses[0] != losses[1]
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(spread), strict=True
    ):
        assert np.linalg.norm(want) > 0, path
        assert np.linalg.norm(got - want) < 5e-6 * np.linalg.norm(want), path
    jax.tree.map(np.testing.assert_array_equal, frozen, trained[1])
    shares = lambda leaf: leaf.size // leaf.addressable_shards[0].data.size
    layer = state.params["network"]["layers"]["block_0"]["mlp"]["up"]
    assert shares(layer["lora_a"]) == 4 and shares(layer["lora_b"]) == 2
    for tree in (state.ema, state.opt_state[1][1][0].mu):
        assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(
            lambda x: x.sharding, state.params
        )
