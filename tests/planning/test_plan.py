"""The planner: what is counted in a compiled program's text, and what a plan says."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vdx import plan
from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.records import ready_example
from vdx.experiment import Experiment
from vdx.flops import traced
from vdx.hardware import GIB
from vdx.parallel import MeshSpec, put_batch
from vdx.planning import estimate
from vdx.planning.estimate import Job, Slice, bytes_held, least_memory
from vdx.planning.hlo import Program, by_kind
from vdx.train.compile import abstract_batch

ROOT = Path(__file__).parents[2]
SHAPE = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)


def network(weights, x):
    """Five scanned layers, then one product more."""
    y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
    return (y @ weights[0]).sum()


def test_scanned_layers_count_as_often_as_they_run():
    args = SHAPE(5, 64, 64), SHAPE(8, 64)
    step = jax.jit(jax.value_and_grad(network))
    compiled = step.lower(*args).compile()
    found = Program(compiled.as_text())
    assert found.flops == traced(step, *args) == 6 * 2 * 8 * 64 * 64 * 3
    assert found.flops > 2 * compiled.cost_analysis()["flops"]  # XLA: a layer once
    assert found.collectives == [] and found.kernels == 0
    # Weights are read forwards and backwards, at least, and their gradients written.
    assert found.traffic >= 3 * 5 * 64 * 64 * 4


def test_what_stands_after_a_kernel_counts():
    """As the TPU compiler writes it: the kernel's metadata are of several lines."""
    found = Program("""HloModule m

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %k = f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={a={
"b":"{c}"
}}, backend_config={}
  ROOT %y = f32[8,8]{1,0} dot(%k, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""")
    assert found.kernels == 1 and found.flops == 2 * 8**3


def test_collectives_by_kind_and_place():
    mesh = MeshSpec(data=1, fsdp=8).make()
    split = NamedSharding(mesh, P(None, None, "fsdp"))
    args = (
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))),
    )
    found = by_kind(Program(jax.jit(network).lower(*args).compile().as_text()).collectives)
    layer = 64 * 64 * 4
    assert found["all-gather"]["looped"] == {"count": 5, "bytes": 5 * layer, "largest": layer}
    assert found["all-gather"]["outside"]["largest"] < layer  # of features
    assert found["all-reduce"]["outside"]["bytes"] == 4  # the sum


# As the TPU compiler writes it: a gather in three fusions of one channel, a trip count that only
# the condition says, a batched product as a convolution with holes, an array in fast memory.
TPU = """HloModule jit_step, is_scheduled=true

%start (p: bf16[16,64]) -> bf16[64,64] {
  %p = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%step (p.1: bf16[16,64]) -> bf16[64,64] {
  %p.1 = bf16[16,64]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,64]{1,0} all-gather(%p.1), channel_id=7, dimensions={0}
}

%body (c: (s32[], f32[4,8,32], bf16[16,64])) -> (s32[], f32[4,8,32], bf16[16,64]) {
  %c = (s32[]{:T(128)}, f32[4,8,32]{2,1,0:T(8,128)S(1)}, /*index=2*/bf16[16,64]{1,0}) parameter(0)
  %x = f32[4,8,32]{2,1,0:T(8,128)S(1)} get-tuple-element(%c), index=1
  %w = bf16[16,64]{1,0} get-tuple-element(%c), index=2
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %f.1 = bf16[64,64]{1,0} fusion(%w), kind=kCustom, calls=%start
  %f.2 = bf16[64,64]{1,0} fusion(%w), kind=kCustom, calls=%step
  %y = f32[4,8,8]{2,1,0} convolution(%x, %x), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, \
dim_labels=0bf_0oi->0bf
  ROOT %t = (s32[]{:T(128)}, f32[4,8,32]{2,1,0:T(8,128)S(1)}, bf16[16,64]{1,0}) tuple(%i, %x, %w)
}

%condition (c.1: (s32[], f32[4,8,32], bf16[16,64])) -> pred[] {
  %c.1 = (s32[], f32[4,8,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(14)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: (s32[], f32[4,8,32], bf16[16,64])) -> f32[] {
  %a = (s32[], f32[4,8,32]{2,1,0}, bf16[16,64]{1,0}) parameter(0)
  %loop = (s32[], f32[4,8,32]{2,1,0}, bf16[16,64]{1,0}) while(%a), condition=%condition, body=%body
  %k = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  %h = bf16[64]{0:T(256)} all-reduce-start(%k), channel_id=9, to_apply=%add
  ROOT %r = f32[] constant(0)
}
"""


def test_what_the_tpu_compiler_writes():
    found = Program(TPU)
    assert found.flops == 14 * 2 * 4 * 8 * 8 * 32  # four products of 8 x 32 x 8
    assert by_kind(found.collectives) == {
        "all-gather": {"looped": {"count": 14, "bytes": 14 * 64 * 64 * 2, "largest": 64 * 64 * 2}},
        "all-reduce": {"outside": {"count": 1, "bytes": 128, "largest": 128}},
    }
    assert found.kernels == 1
    # What is gathered passes through two fusions; the product's operand is in fast memory.
    each = 4 * 8 * 8 * 4
    entry = 16 + (4 + 4 * 8 * 32 * 4 + 16 * 64 * 2) + 16 + 128 + 4 + 4 + 1  # and i < n
    assert found.traffic == 14 * each + entry


def test_only_slices_move():
    """Layers are slices of stacked weights, also those on their way to fast memory, and their
    results slices of a stack; what is on its way from other devices passes through fusions. Of a
    collective of several arrays all are sent."""
    found = Program("""HloModule m

%layer (s: f32[40,8,8], i: s32[], w: f32[9,8]) -> (f32[40,8,8], f32[9,8], f32[8,8]) {
  %s = f32[40,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = f32[9,8]{1,0} parameter(2)
  %one = f32[1,8,8]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  %flat = f32[8,8]{1,0} bitcast(%one)
  %new = f32[1,8,8]{2,1,0} negate(%one)
  %all = f32[40,8,8]{2,1,0} dynamic-update-slice(%s, %new, %i, %i, %i)
  ROOT %t = (f32[40,8,8]{2,1,0}, f32[9,8]{1,0}, f32[8,8]{1,0}) tuple(%all, %w, %flat)
}

ENTRY %main (a: f32[40,8,8], k: s32[], b: f32[9,8]) -> f32[8,8] {
  %a = f32[40,8,8]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %b = f32[9,8]{1,0} parameter(2)
  %f = (f32[40,8,8]{2,1,0}, f32[9,8]{1,0}, f32[8,8]{1,0}) fusion(%a, %k, %b), calls=%layer
  %y = f32[8,8]{1,0} get-tuple-element(%f), index=2
  %r = (f32[8,8]{1,0}, f32[4,8,8]{2,1,0}) all-reduce-start(%y, %a), channel_id=1, to_apply=%add
  %c = ((f32[40,8,8]{2,1,0}), f32[2,8,8]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:2]}
  %e = f32[2,8,8]{2,1,0:S(1)} slice-done(%c)
  ROOT %d = f32[1,8,8]{2,1,0} dynamic-slice(%a, %k, %k, %k), dynamic_slice_sizes={1,8,8}
}
""")
    layer, index, stack = 8 * 8 * 4, 4, 40 * 8 * 8 * 4
    fusion = (layer + index) + 2 * layer  # a slice read; one written into place, one out
    reduce = layer + stack + 5 * layer
    assert found.traffic == fusion + reduce + 2 * layer + 2 * layer
    (one,) = found.collectives
    assert (one.bytes, one.largest) == (layer + stack, stack)


@pytest.fixture(scope="module")
def base():
    config = resolve(
        f"{ROOT}/configs/t2v_base.py",
        ["--config.model.backbone.size=tiny", "--config.data.loader.global_batch=32"],
    )
    return Job(Experiment(config), "train", (16, 32, 32, 4), 256)


def test_a_gpu_is_planned_without_a_compiler(base):
    row = plan.plan(base, Slice("h100:8"))
    json.dumps(row)
    assert row["mesh"] == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1} and row["fits"]
    state = 16 * row["parameters"] / 8  # weights, average, two moments
    batch = 32 / 8 * (16 * 32 * 32 * 4 * 2 + 256 * 4096 * 2)
    assert row["memory"]["arguments"] == pytest.approx(state + batch, rel=0.04)
    assert row["model_flops"] == 3 * 32 * base.experiment.model.flops((16, 32, 32, 4), 256)
    assert row["stated_flops"] == pytest.approx(4 / 3 * row["model_flops"], rel=0.01)  # remat
    text = plan.table(row, 1000, 2.0)
    assert "estimated, not compiled" in text and "USD" in text and "fits" in text


@pytest.mark.slow
def test_a_sampler_and_a_decoder(base):
    e = base.experiment
    sample = dataclasses.replace(base, what="sample")
    assert sample.model_flops == 50 * 2 * 16 * e.model.flops((16, 32, 32, 4), 256)
    # Conditions are told once; the trace of a loop of 50 is otherwise what was asked for.
    assert sample.stated_flops == pytest.approx(sample.model_flops, rel=0.02)
    decode = dataclasses.replace(base, what="decode", clip=(2, 8, 8, 4))
    assert decode.model_flops == decode.stated_flops > 1e9


def test_least_memory_grows_with_the_clips(base):
    mesh = Slice("h100:8").mesh(MeshSpec(fsdp=4))
    one, two = (least_memory(base, mesh, clips) for clips in (32, 64))
    assert two["kept"] == 2 * one["kept"] > 0
    assert two["gradients"] == one["gradients"] and two["arguments"] > one["arguments"]
    assert bytes_held(SHAPE(3, 4)) == 48


def test_a_batch_without_data_is_that_with_data(mesh, at_root):
    for name in ("t2v_tiny", "control_tiny"):
        e = Experiment(resolve(f"configs/{name}.py", ["--config.data.loader.global_batch=2"]))
        batches = e.batches(workers=0)
        real = put_batch(mesh, next(batches))
        batches.close()
        clip = (*real["video"].shape[1:4], e.model.channels)
        assert clip == plan.shapes(e, None, None)[0]
        abstract = abstract_batch(e.model, mesh, clip, global_batch=2, cached=False)
        assert facts(abstract) == facts(real), name


def facts(batch):
    return {k: (v.shape, str(v.dtype)) for k, v in batch.items()}


def test_a_cached_batch_is_as_the_cache_gives_it(base, mesh):
    row = {
        "latents": np.zeros((16, 32, 32, 4), np.float16),
        "fps": 8.0,
        "num_frames": 16,
        "text": np.zeros((9, 4096), np.float16),
    }
    example = ready_example(row, "a", {"text": [256, 4096]})
    del example["key"]
    real = put_batch(mesh, {k: np.stack([v] * 32) for k, v in example.items()})
    model = base.experiment.model
    abstract = abstract_batch(model, mesh, base.clip, global_batch=32, cached=True, text=256)
    assert facts(abstract) == facts(real)


def test_out_of_memory_is_an_answer(base):
    assert estimate.out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 51.34G of 31.25G hbm. "
        "Exceeded hbm capacity by 20.09G."
    ) == {"needs": 51.34 * GIB, "has": 31.25 * GIB}
    assert estimate.out_of_memory(
        "Ran out of memory on HBM, the total memory required for HLO temporaries (20.83G) exceeds "
        "available HBM (15.75G)."
    ) == {"needs": 20.83 * GIB, "has": 15.75 * GIB}
    row = plan.plan(base, Slice("h100:8"))
    row |= {
        "fits": False,
        "compiled": True,
        "compile_seconds": 1.0,
        "memory_has": 31.25 * GIB,
        "memory": {"needs": 51.34 * GIB},
    }
    del row["bounds"], row["flops"]
    text = plan.table(row, 1000, None)
    assert "needs 51.34 GiB of 31.25" in text and "grad_accum_steps=2" in text
    assert "does not fit" in plan.ranking([row])


@pytest.mark.slow
def test_a_search_prunes_and_sorts(base, capsys):
    rows = plan.search(base, Slice("a100-40:2"), 3)
    times = [plan._per_clip(row) for row in rows]
    assert len(rows) == 3 and times == sorted(times)
    assert "variants" in capsys.readouterr().out
    assert "mesh" in plan.ranking(rows)


@pytest.mark.parametrize(
    ("name", "message"),
    [("v9:2x2", "unknown name 'v9'"), ("v5e", "is not like v5e:4x4"), ("h100:2x4", "is not like")],
)
def test_slices_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message):
        assert Slice(name).chip and Slice(name).devices


def test_without_the_compiler_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vdx\[tpu\]'"):
        Slice("v5e:2x2").mesh(MeshSpec())


def test_shapes_that_nobody_says(base):
    with pytest.raises(ConfigError, match="--clip=16,32,32 --text=256"):
        plan.shapes(base.experiment, None, None)
    with pytest.raises(ConfigError, match="is not frames, height and width"):
        plan.shapes(base.experiment, (16, 32), 256)
    with pytest.raises(app.UsageError):
        plan.sizes("16,a")
    assert plan.shapes(base.experiment, (8, 16, 16), 77) == ((8, 16, 16, 4), 77)


def test_meshes():
    found = list(plan.meshes(8))
    assert len(found) == 20 and all(math.prod(mesh.values()) == 8 for mesh in found)
