"""Optimizers: what each does to which parameters, and the schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdx.config.build import ConfigError
from vdx.train.optim import OPTIMIZERS, SCHEDULES, Optimizer

RNG = np.random.default_rng(0)
SHAPES = {
    "network": {
        "layers": {
            "block_0": {"mlp": {"up": {"kernel": (3, 8, 24), "bias": (3, 24)}}, "table": (3, 6, 8)}
        },
        "encoder": {
            "down_0_1": {"res": {"conv1": {"kernel": (3, 3, 4, 8)}}},
            "conv_in": {"kernel": (3, 3, 4, 8)},
        },
        "patch": {"kernel": (12, 8)},
    },
    "text": {"bytes": {"embedding": (20, 8)}},
}
is_shape = lambda x: isinstance(x, tuple)
draw = lambda: jax.tree.map(
    lambda s: jnp.asarray(RNG.normal(size=s), jnp.float32), SHAPES, is_leaf=is_shape
)
PARAMS, GRADS = draw(), draw()


def update(tx, grads):
    return jax.jit(lambda grads: tx.update(grads, tx.init(PARAMS), PARAMS)[0])(grads)


@functools.cache
def first_update(name, weight_decay):
    return update(
        Optimizer(name, 1.0, warmup_steps=0, schedule="constant", weight_decay=weight_decay).make(
            10
        ),
        GRADS,
    )


def kernel(tree):
    return np.asarray(tree["network"]["layers"]["block_0"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_goes_downhill_for_every_parameter(name):
    updates = first_update(name=name, weight_decay=0.0)
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS), strict=True):
        assert (u * g).sum() < 0 and np.isfinite(u).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_matrices_decay(name):
    with_decay = first_update(name=name, weight_decay=0.1)
    without = first_update(name=name, weight_decay=0.0)
    pulled = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), with_decay, without)
    assert pulled["network"]["layers"]["block_0"]["mlp"]["up"]["kernel"] > 0.05
    assert pulled["network"]["layers"]["block_0"]["mlp"]["up"]["bias"] == 0
    assert pulled["network"]["layers"]["block_0"]["table"] == 0
    assert pulled["text"]["bytes"]["embedding"] == 0


def test_muon_orthogonalises_each_layer_at_the_size_of_adamw_and_leaves_the_rest_to_it():
    muon = first_update(name="muon", weight_decay=0.0)
    adamw = first_update(name="adamw", weight_decay=0.0)
    for layer in kernel(muon):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() / singular.min() < 2.2  # five Newton-Schulz steps
        assert 0.1 < np.sqrt((layer**2).mean()) < 0.3  # 0.2 of the learning rate
    conv = np.asarray(muon["network"]["encoder"]["down_0_1"]["res"]["conv1"]["kernel"])
    singular = np.linalg.svd(conv.reshape(36, 8), compute_uv=False)
    assert singular.max() / singular.min() < 2.2 and 0.1 < np.sqrt((conv**2).mean()) < 0.3
    singular = np.linalg.svd(kernel(adamw)[0], compute_uv=False)
    assert singular.max() / singular.min() > 2.2  # the gradient itself is not orthogonal
    tx = optax.adamw(1.0, b1=0.9, b2=0.99, weight_decay=0.0, nesterov=True)
    clipped, _ = optax.clip_by_global_norm(1.0).update(GRADS, optax.EmptyState())
    rest, _ = tx.update(clipped, tx.init(PARAMS), PARAMS)
    for path in (
        ("network", "patch", "kernel"),
        ("network", "encoder", "conv_in", "kernel"),
        ("text", "bytes", "embedding"),
    ):
        a, b = muon, rest
        for key in path:
            a, b = a[key], b[key]
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_warms_up_and_ends_as_configured(schedule):
    o = Optimizer(learning_rate=0.5, warmup_steps=10, schedule=schedule, end_factor=0.1)
    rate = o.rate(100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 0.25, 0.5], rtol=1e-6)
    np.testing.assert_allclose(rate(100), 0.5 if schedule == "constant" else 0.05, rtol=1e-6)


def test_large_gradients_are_clipped():
    huge = jax.tree.map(lambda g: 1e6 * g, GRADS)
    clipped, _ = optax.clip_by_global_norm(1.0).update(huge, optax.EmptyState())
    tx = Optimizer(warmup_steps=0, max_grad_norm=1.0).make(10)
    np.testing.assert_allclose(
        kernel(update(tx, huge)),
        kernel(update(tx, clipped)),
        rtol=1e-4,
    )


def test_clipping_at_0_is_off():
    """It once made every gradient zero, and left the weights to the decay alone."""
    huge = jax.tree.map(lambda g: 1e6 * g, GRADS)
    for grads in (GRADS, huge):
        tx = Optimizer(warmup_steps=0, max_grad_norm=0.0, weight_decay=0.0).make(10)
        wide = Optimizer(warmup_steps=0, max_grad_norm=1e30, weight_decay=0.0).make(10)
        got = kernel(update(tx, grads))
        np.testing.assert_array_equal(got, kernel(update(wide, grads)))
        assert np.abs(got).max() > 0


@pytest.mark.parametrize("field", ["name", "schedule"])
def test_unknown_names_list_the_known(field):
    with pytest.raises(ConfigError, match=f"config.optim.{field}"):
        Optimizer(**{field: "sgd"}).make(10)
