"""The counts of a compiled program's text, against programs whose counts are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vdx.flops import traced
from vdx.parallel import MeshSpec
from vdx.planning.hlo import Program, by_kind
from vdx.planning.hlo_products import AxisWindow, pairs_along_axis
from vdx.planning.hlo_text import parse_instruction

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


def test_instructions_after_a_kernel_count():
    """The TPU compiler writes the metadata of a kernel in several lines."""
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


# A program as the TPU compiler writes it: a gather in three fusions of one channel, a trip count
# that only the condition contains, a batched product as a convolution with holes, and an array in
# fast memory.
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


def test_text_of_the_tpu_compiler():
    found = Program(TPU)
    assert found.flops == 14 * 2 * 4 * 8 * 8 * 32  # four products of 8 x 32 x 8
    assert by_kind(found.collectives) == {
        "all-gather": {"looped": {"count": 14, "bytes": 14 * 64 * 64 * 2, "largest": 64 * 64 * 2}},
        "all-reduce": {"outside": {"count": 1, "bytes": 128, "largest": 128}},
    }
    assert found.kernels == 1
    # The gathered weights pass through two fusions; the product's operand is in fast memory.
    each = 4 * 8 * 8 * 4
    entry = 16 + (4 + 4 * 8 * 32 * 4 + 16 * 64 * 2) + 16 + 128 + 4 + 4 + 1  # and i < n
    assert found.traffic == 14 * each + entry


def test_only_slices_move():
    """Only the slices of stacked arrays that a layer reads and writes count.

    This includes slices that are copied to fast memory. Arrays that arrive from other devices pass
    through fusions. A collective of several arrays sends all of them.
    """
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


def test_an_instruction_is_parsed():
    line = "  ROOT %y = (f32[8,4]{1,0:T(8,128)S(1)}, s4[3]{0}) fusion(%a, %b), calls=%body, k={1}"
    parsed = parse_instruction(line)
    assert (parsed.name, parsed.opcode, parsed.operands) == ("y", "fusion", ("a", "b"))
    assert [result.sizes for result in parsed.results] == [(8, 4), (3,)]
    assert [result.bytes for result in parsed.results] == [128, 1.5]
    assert [result.in_main_memory for result in parsed.results] == [False, True]
    assert parsed.is_root and parsed.callees == [("calls", "body")]
    assert parse_instruction("}}, backend_config={}") is None


@pytest.mark.parametrize(
    ("window", "pairs"),
    [
        (AxisWindow(1, 0, 1, 1), 12),  # all of 4 outputs x 3 kernel entries
        (AxisWindow(1, 1, 1, 1), 11),  # the first output reads one entry of padding
        (AxisWindow(1, 0, 2, 1), 6),  # every other place is a hole
        (AxisWindow(2, 0, 1, 2), 6),  # outputs read 3, 2, 1 and 0 of the 6 inputs
    ],
)
def test_pairs_that_read_padding_or_holes_do_not_count(window, pairs):
    assert pairs_along_axis(6, 3, 4, window) == pairs
