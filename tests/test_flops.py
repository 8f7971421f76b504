"""What networks say that they cost, against XLA's count and against the traced program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from vdx.config.loader import resolve
from vdx.experiment import Experiment
from vdx.flops import traced
from vdx.hardware import CHIPS, chip_of
from vdx.models.shapes import init_shapes, new_shapes
from vdx.models.transformer import Transformer
from vdx.models.unet.unet import UNet
from vdx.types import Ports

CLIP = (8, 16, 16, 4)
shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
TEXT = dict(tokens=shape(1, 77, 384), tokens_mask=jax.ShapeDtypeStruct((1, 77), bool))
# case -> (fields, clip, ports)
CASES = {
    "no text": ({}, CLIP, Ports()),
    "text": ({"pattern": "factorized", "activation": "geglu"}, CLIP, Ports(**TEXT)),
    "plain cross-attention": ({"pattern": "latte", "cross": "plain"}, CLIP, Ports(**TEXT)),
    "an image": ({"pattern": "factorized"}, (1, 32, 32, 4), Ports(**TEXT)),
    "image tokens": ({}, CLIP, Ports(**TEXT, image_tokens=shape(1, 257, 384))),
    "concat": ({"skip": True, "patch": (2, 2, 2)}, CLIP, Ports(concat=shape(1, *CLIP[:3], 20))),
    "control": ({}, CLIP, Ports(control=shape(1, *CLIP[:3], 96), control_scale=shape(1))),
}


def forward(model, clip, ports):
    """(function, its arguments as shapes)"""
    args = shape(1, *clip), shape(1), ports
    return model.apply, ({"params": init_shapes(model, *args)}, *args)


def make(case):
    fields = CASES[case][0]
    return functools.partial(Transformer, channels=4, width=384, heads=6, attention="xla", **fields)


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_xla_counts(case):
    """XLA counts a scanned layer once, and a few percent that is no matrix product."""
    _, clip, ports = CASES[case]
    once = make(case)(depth=len(make(case)().dims().pattern))
    run, args = forward(once, clip, ports)
    counted = jax.jit(run).lower(*args).cost_analysis()["flops"]
    assert 1 <= counted / once.flops(clip, ports) < 1.04


@pytest.mark.parametrize("case", ["text", "control"])
def test_the_formula_of_many_layers_is_what_is_traced(case):
    _, clip, ports = CASES[case]
    deep = make(case)(depth=4)
    run, args = forward(deep, clip, ports)
    assert traced(run, *args) == pytest.approx(deep.flops(clip, ports), rel=1e-6)


def test_a_u_net_is_traced():
    model = UNet(widths=(64,), layers=1, attention=(True,), temporal="motion")
    clip, ports = (2, 8, 8, 4), Ports(**TEXT)
    run, args = forward(model, clip, ports)
    counted = jax.jit(run).lower(*args).cost_analysis()["flops"]
    assert 0.93 <= counted / model.flops(clip, ports) < 1.07


def test_loops_branches_and_kernels():
    x, product = shape(8, 8), 2.0 * 8**3

    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    def kernel(x):
        def body(a, out):
            out[...] = a[...]

        return pl.pallas_call(
            body,
            out_shape=x,
            cost_estimate=pl.CostEstimate(flops=123, transcendentals=0, bytes_accessed=0),
            interpret=True,
        )(x)

    assert traced(loop, x) == 5 * product
    assert traced(jax.grad(lambda x: jax.checkpoint(loop)(x).sum()), x) == (5 + 15) * product
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, loop, lambda x: x @ x, x)
    assert traced(branch, x) == 5 * product
    assert traced(kernel, x) == 123


@pytest.mark.parametrize("kernel,stride", [((3, 3, 3), 1), ((1, 3, 3), (1, 2, 2))])
def test_convolutions(kernel, stride):
    """Here padding is counted as if it were pixels, which XLA leaves out."""
    conv = nn.Conv(16, kernel, stride)
    x = shape(1, 16, 32, 32, 8)
    params = {"params": init_shapes(conv, x)}
    counted = jax.jit(conv.apply).lower(params, x).cost_analysis()["flops"]
    assert 1 <= traced(conv.apply, params, x) / counted < 1.15


@pytest.mark.parametrize("config", ["t2v_tiny", "i2v_base"])
def test_a_denoiser_is_its_network_and_its_conditions(config, at_root):
    model = Experiment(resolve(f"configs/{config}.py", [])).model
    clip = (16, 32, 32, model.channels)

    def whole(params, x, batch):
        return model.run(
            params, x, jnp.ones(1), batch, model.drop_masks(1, False), method="train_view"
        )

    batch = jax.eval_shape(lambda: model.conditioning.dummy_batch(clip))
    if "embeddings" in model.signals:
        batch |= {"text": shape(1, 256, 4096), "text_mask": jax.ShapeDtypeStruct((1, 256), bool)}
    params = new_shapes(model)
    assert model.flops(clip, 256) == pytest.approx(
        traced(whole, params, shape(1, *clip), batch), rel=1e-6
    )


def test_chips_by_what_jax_calls_them():
    names = {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5e": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "tpu7x",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
    }
    assert {kind: chip_of(kind) for kind in names} == {
        kind: CHIPS[name] for kind, name in names.items()
    }
    assert set(names.values()) == set(CHIPS) and chip_of("cpu") is None
