"""The transformer as a whole: what enters where, remat, scan, types, images, sizes."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.models.mixers.context import CachePosition
from vdx.models.mixers.table import PATTERNS
from vdx.models.remat import REMAT, check_remat
from vdx.models.shapes import init_shapes
from vdx.models.transformer import SIZES, Transformer
from vdx.models.transformer_blocks import modulate
from vdx.parallel import MeshSpec
from vdx.types import Ports

RNG = np.random.default_rng(0)
CLIP = RNG.normal(size=(2, 4, 4, 8, 3)).astype(np.float32)
TIME = np.array([10.0, 700.0], np.float32)
PORTS = Ports(
    tokens=RNG.normal(size=(2, 5, 24)).astype(np.float32),
    tokens_mask=np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool),
    vector=RNG.normal(size=(2, 24)).astype(np.float32),
)
SMALL = dict(width=24, depth=4, heads=2, patch=(2, 2, 2))


def shapes(model, x=CLIP, ports=PORTS):
    return init_shapes(model, x, TIME, ports)


def test_modulation():
    shift, scale = RNG.normal(size=(2, 2, 1, 1, 1, 24))
    x = RNG.normal(size=(2, 3, 2, 4, 24))
    plain = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    got = modulate(*(jnp.asarray(a, jnp.float32) for a in (x, shift, scale)))
    np.testing.assert_allclose(got, plain * (1 + scale) + shift, atol=1e-5)


def value_and_grad(model):
    def loss(params):
        out = model.apply({"params": params}, CLIP, TIME, PORTS)
        return jnp.square(out).mean(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


PLAIN = value_and_grad(Transformer(**SMALL, pattern="factorized"))


@pytest.fixture(scope="module")
def reference(randomise):
    """(parameters, outputs, gradients) of the factorized transformer without remat."""
    model = Transformer(**SMALL, pattern="factorized")
    params = randomise(shapes(model))
    (_, out), grads = PLAIN(params)
    return params, np.asarray(out), grads


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)


def test_skip_maps_concatenated_channels_to_their_own_patch(randomise):
    """A fresh network predicts zero; with `skip` concatenated channels bypass it."""
    model = Transformer(**SMALL, skip=True)
    concat = RNG.normal(size=(*CLIP.shape[:-1], 2)).astype(np.float32)
    ports = PORTS.replace(concat=concat)
    params = randomise(shapes(model, ports=ports))
    params["unpatch"] = jax.tree.map(np.zeros_like, params["unpatch"])  # the network is silent
    run = lambda concat: model.apply({"params": params}, CLIP, TIME, ports.replace(concat=concat))
    assert not np.any(run(np.zeros_like(concat)))
    one = np.zeros_like(concat)
    one[0, 3, 1, 6, 1] = 1.0
    got = np.array(run(one))
    kernel = params["skip"]["kernel"].reshape(2, 2, 2, 2, 2, 2, 2, 3)  # i j k c -> i j k c
    np.testing.assert_allclose(got[0, 2:4, 0:2, 6:8], kernel[1, 1, 0, 1], atol=1e-6)
    got[0, 2:4, 0:2, 6:8] = 0
    assert not got.any()


@pytest.mark.parametrize(
    "remat",
    [pytest.param(r, marks=pytest.mark.slow) if r != "full" else r for r in REMAT if r != "none"],
)
def test_remat_changes_nothing(remat, reference):
    params, out, grads = reference
    run = value_and_grad(Transformer(**SMALL, pattern="factorized", remat=remat))
    (_, got), got_grads = run(params)
    assert relative(got, out) < 1e-6
    assert max(jax.tree.leaves(jax.tree.map(relative, got_grads, grads))) < 1e-5
    # and it does recompute: the backward pass has more matrix products
    count = lambda run: str(run.trace(params).jaxpr).count("dot_general")
    assert count(run) > count(PLAIN)


LONG = RNG.normal(size=(2, 8, 16, 16, 3)).astype(np.float32)
CONTROL = dict(control=LONG[::-1], control_scale=np.array([1.0, 0.5], np.float32))


@pytest.fixture(scope="module")
def gradients_of():
    """gradients_of(remat, ports, **fields): (function of the parameters, their shapes)."""

    def make(remat, ports, **fields):
        model = Transformer(**{**SMALL, "attention": "xla", **fields}, remat=remat)
        ports = Ports(**ports)
        run = lambda params: jnp.square(model.apply({"params": params}, LONG, TIME, ports)).mean()
        return jax.value_and_grad(run), shapes(model, LONG, ports)

    return make


@pytest.mark.slow
def test_remat_recomputes_what_it_says(gradients_of):
    """Matrix products of attention (they have axes of batch), and all, of a block and its
    control block."""
    tree = gradients_of("none", CONTROL)[1]

    def products(remat):
        text = str(jax.make_jaxpr(gradients_of(remat, CONTROL)[0])(tree))
        # of a block and its control block, there and back
        assert text.count("device_put[") == (4 if remat == "offload" else 0)
        batch = re.findall(
            r"dimension_numbers=\(\(\[[\d, ]*\], \[[\d, ]*\]\), \(\[([\d, ]*)\]", text
        )
        return np.array([sum(map(bool, batch)), len(batch)])

    plain, dots, saved, full = map(products, ("none", "dots", "save_attention", "full"))
    np.testing.assert_array_equal(products("offload"), full)
    assert full[0] == dots[0] == plain[0] + 2 * 2 and full[1] > saved[1] > dots[1]
    # softmax(q k) is in any backward pass; its product with the values is not made again
    assert saved[0] <= plain[0] + 2 and saved[1] - saved[0] == full[1] - full[0]


def test_remat_keeps_less(gradients_of):
    """By the compiler's account of the bytes that live between the passes."""

    def kept(remat):
        run, params = gradients_of(remat, {}, depth=8)
        made = jax.jit(run).lower(params).compile()
        return made.memory_analysis().temp_size_in_bytes

    none, attention, full = map(kept, ("none", "save_attention", "full"))
    assert none > 4 * attention
    one = 2 * 4 * 8 * 8 * 24 * 4  # bytes of one answer of attention
    assert 4 * one < attention - full < 9 * one  # 8, less what the passes share


@pytest.mark.slow
def test_remat_of_control_blocks_on_two_devices_changes_nothing(gradients_of, randomise):
    mesh, out = MeshSpec().make(jax.devices()[:2]), []
    with jax.set_mesh(mesh):
        for remat in ("none", "save_attention", "offload"):
            run, tree = gradients_of(remat, CONTROL, depth=2)
            out.append(jax.jit(run)(randomise(tree)))
    for other in out[1:]:
        assert relative(other[0], out[0][0]) < 1e-6
        assert max(jax.tree.leaves(jax.tree.map(relative, other[1], out[0][1]))) < 1e-5


def test_offload_needs_memory_of_the_host():
    check_remat("offload", jax.devices()[0])
    bare = SimpleNamespace(
        device_kind="Toaster", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    check_remat("full", bare)
    with pytest.raises(ConfigError, match="pinned_host, and Toaster has device"):
        check_remat("offload", bare)


def test_scan_is_the_loop(reference):
    """Periods scanned over the depth against the same layers written one after another."""
    params, out, grads = reference
    once = Transformer(**{**SMALL, "depth": 4}, pattern=PATTERNS["factorized"] * 2)
    layers = params["layers"]
    unrolled = {
        f"block_{2 * i + j}": jax.tree.map(lambda v, i=i: v[i : i + 1], layers[f"block_{j}"])
        for i in range(2)
        for j in range(2)
    }
    (_, got), got_grads = value_and_grad(once)({**params, "layers": unrolled})
    assert relative(got, out) < 1e-6
    want = jax.tree.map(lambda v: v[1:], grads["layers"]["block_0"])
    assert max(jax.tree.leaves(jax.tree.map(relative, got_grads["layers"]["block_2"], want))) < 1e-5


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(reference):
    params, out, grads = reference
    (_, got), got_grads = value_and_grad(
        Transformer(**SMALL, pattern="factorized", dtype="bfloat16")
    )(params)
    assert got.dtype == jnp.float32 and 1e-4 < relative(got, out) < 0.03
    flat = lambda tree: np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)])
    assert relative(flat(got_grads), flat(grads)) < 0.05
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(got_grads))


# What sees the last frame of a clip of four, in patches of two: the first patch, and the place.
SEEN = dict.fromkeys(PATTERNS, (True, True)) | {
    "factorized_causal": (False, True),
    "recurrent": (False, True),
    "frames": (False, True),
    "conv": (True, True),
    "mixed": (True, True),
}
SPELLED = {"mixed": ("space", "full", "time", {"name": "time", "window": 1})}


@pytest.mark.parametrize(
    "pattern",
    [
        name if name in ("full", "mixed") else pytest.param(name, marks=pytest.mark.slow)
        for name in SEEN
    ],
)
def test_a_fresh_transformer_predicts_zero_and_a_trained_one_sees_what_it_should(
    pattern, randomise
):
    model = Transformer(**SMALL, pattern=SPELLED.get(pattern, pattern))
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, TIME, PORTS))
    tree = shapes(model)
    zero_ends = randomise(tree)
    zero_ends["unpatch"] = jax.tree.map(np.zeros_like, zero_ends["unpatch"])
    assert not np.asarray(run(zero_ends, CLIP)).any()
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}
    params = randomise(tree)
    changed = CLIP.copy()
    changed[0, -1, -1, -1] += 1  # one pixel of one clip
    difference = np.abs(run(params, changed) - run(params, CLIP)).max(-1)
    assert not difference[1].any()
    seen = tuple(bool((part > 0).all()) for part in (difference[0, :2], difference[0, 2:]))
    assert seen == SEEN[pattern] and difference[0, :2].any() == seen[0]


OVER_TIME = ("time", {"name": "conv", "kernel": (3, 1, 1)}, "recurrent")
IMAGE = dict(width=24, depth=1, heads=2, patch=(1, 2, 2), pattern=("space",))


def test_an_image_is_a_clip_of_one_frame(randomise):
    """It passes by the blocks that work over time alone: what is left is the model of images."""
    image = Transformer(**IMAGE)
    model = Transformer(**IMAGE | {"depth": 4, "pattern": ("space", *OVER_TIME)})
    # As Denoiser.new_params, from one patch, which is an image: all parameters are there.
    params = randomise(shapes(model, CLIP[:, :1, :2, :2]))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes(model))
    blocks = params["layers"]
    assert [
        set(blocks[f"block_{i}"]) - {"table", "mlp", "cross", "cross_norm"} for i in range(4)
    ] == [{"space"}, {"time"}, {"conv"}, {"recurrent"}]
    few = {**params, "layers": {"block_0": blocks["block_0"]}}
    run = lambda model, params: jax.jit(
        lambda p: model.apply({"params": p}, CLIP[:, :1], TIME, PORTS)
    )(params)
    np.testing.assert_array_equal(run(model, params), run(image, few))


def test_frame_by_frame_with_a_past_it_is_the_whole_clip(randomise):
    """A frame that has a past is no image, and passes by no block."""
    model = Transformer(
        **IMAGE | {"depth": 3, "pattern": ("space", {"name": "time", "block": 1}, "recurrent")}
    )
    params = randomise(shapes(model))
    frames = CLIP.shape[1]
    step = jax.jit(
        lambda cache, x, start: model.apply(
            {"params": params, **cache},
            x,
            TIME,
            PORTS,
            CachePosition(start, frames),
            mutable=["cache"],
        ),
    )
    empty = jax.eval_shape(step, {}, CLIP[:, :1], jnp.int32(0))[1]
    cache, out = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), empty), []
    for i in range(frames):
        y, cache = step(cache, CLIP[:, i : i + 1], jnp.int32(i))
        out.append(y)
    whole = jax.jit(lambda: model.apply({"params": params}, CLIP, TIME, PORTS))()
    np.testing.assert_allclose(np.concatenate(out, 1), whole, atol=1e-5)


@pytest.mark.slow
def test_independent_frames_are_as_many_images(randomise):
    model = Transformer(**IMAGE | {"depth": 2, "pattern": "frames"})
    params = randomise(shapes(model))
    run = jax.jit(lambda x: model.apply({"params": params}, x, TIME, PORTS))
    frames = np.concatenate([run(CLIP[:, i : i + 1]) for i in range(CLIP.shape[1])], 1)
    np.testing.assert_allclose(run(CLIP), frames, atol=1e-5)


def test_ports_enter_where_they_say(reference):
    params, out, _ = reference
    model = Transformer(**SMALL, pattern="factorized")
    run = jax.jit(lambda ports: model.apply({"params": params}, CLIP, TIME, ports))
    add = RNG.normal(size=(2, 2, 2, 4, 24)).astype(np.float32)
    assert relative(run(PORTS.replace(add=0 * add)), out) < 1e-6
    for field, value in {
        "add": add,
        "vector": PORTS.vector + 1,
        "tokens": PORTS.tokens + 1,
        "tokens_mask": None,
    }.items():
        assert relative(run(PORTS.replace(**{field: value})), out) > 0.01, field
    wide = shapes(model, ports=PORTS.replace(concat=CLIP))["patch"]["kernel"].shape
    assert wide == (2 * 2 * 2 * 6, 24)


def test_a_time_for_each_frame(reference):
    params, out, _ = reference
    model = Transformer(**SMALL, pattern="factorized")
    run = jax.jit(lambda time: model.apply({"params": params}, CLIP, time, PORTS))
    same = np.repeat(TIME[:, None], 4, 1)
    assert relative(run(same), out) < 1e-6
    other = run(same * [0, 1, 1, 1])  # patches of two frames take the time of the first
    assert relative(other, out) > 0.01
    np.testing.assert_array_equal(run(same * [0, 0, 1, 1]), other)
    with pytest.raises(ValueError, match=r"time is \(2, 3\); a clip of \(2, 4\)"):
        run(same[:, :3])


@pytest.fixture(scope="module")
def controlled(randomise):
    """(parameters, ports with image tokens and control, jitted function of the ports)."""
    model = Transformer(**SMALL, pattern=("full", "time"))
    ports = PORTS.replace(
        image_tokens=RNG.normal(size=(2, 3, 24)).astype(np.float32),
        control=RNG.normal(size=(2, 4, 4, 8, 5)).astype(np.float32),
        control_scale=np.array([1.0, 0.5], np.float32),
    )
    params = randomise(shapes(model, ports=ports))
    return params, ports, jax.jit(lambda p, ports: model.apply({"params": p}, CLIP, TIME, ports))


def test_image_tokens_and_control_reach_the_clip(controlled):
    params, ports, run = controlled
    out = run(params, ports)
    for field in ("image_tokens", "control", "control_scale"):
        changed = run(params, ports.replace(**{field: 1 + getattr(ports, field)}))
        assert (np.abs(changed - out).max((1, 2, 3, 4)) > 0.01).all(), field


def test_control_of_no_weight_is_no_control(controlled):
    params, ports, run = controlled
    plain = run(params, ports.replace(control=None, control_scale=None))
    silenced = run(params, ports.replace(control_scale=np.zeros(2, np.float32)))
    assert relative(silenced, plain) < 1e-6
    fresh = jax.tree.map(np.zeros_like, params["layers"]["hint"])  # as a network begins
    silent = {**params, "layers": {**params["layers"], "hint": fresh}}
    assert relative(run(silent, ports), plain) < 1e-6


def test_there_is_one_control_block_to_a_repetition_of_the_pattern(controlled):
    params = controlled[0]["layers"]
    assert params["control"]["full"]["q"]["kernel"].shape == (2, 24, 24)
    assert params["control"].keys() == params["block_0"].keys()


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    """Parameters of every size, factorized, with 4096-wide text as t2v_base.py has it."""
    model = Transformer(channels=4, size=size, pattern="factorized")
    width = SIZES[size][0]
    x = jax.ShapeDtypeStruct((1, 2, 4, 4, 4), jnp.float32)
    ports = Ports(
        tokens=jax.ShapeDtypeStruct((1, 1, width), jnp.float32),
        tokens_mask=jax.ShapeDtypeStruct((1, 1), bool),
    )
    tree = init_shapes(model, x, jnp.zeros(1), ports)
    project = 4096 * width + width + width * width + width
    millions = (sum(v.size for v in jax.tree.leaves(tree)) + project) / 1e6
    print(f"{size}: {millions:.0f}M")
    low, high = {
        "tiny": (3, 8),
        "S": (20, 40),
        "B": (100, 160),
        "L": (350, 450),
        "XL": (550, 700),
        "wan_1p3b": (1400, 1440),
        "wan_5b": (4950, 5050),
        "wan_14b": (14200, 14350),
    }[size]
    assert low < millions < high


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "XXL"}, "Did you mean 'XL'"),
        ({"pattern": "fullest"}, "Did you mean 'full'"),
        ({"pattern": ("space", "tme")}, "Did you mean 'time'"),
        ({"depth": 3, "pattern": "factorized"}, "not a multiple of the pattern"),
        ({"width": 30, "heads": 6}, "30 over 6 heads is not an even number"),
    ],
)
def test_dims_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(**fields).dims()


def test_a_clip_that_patches_do_not_tile():
    assert Transformer(patch=(2, 4, 4)).grid((4, 8, 16, 3)) == (2, 2, 4)
    with pytest.raises(ValueError, match=r"\(4, 8, 18\).*does not divide into patches"):
        Transformer(patch=(2, 4, 4)).grid((4, 8, 18, 3))
