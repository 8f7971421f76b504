"""Attention, the mixers and the transformer against plain loops, and what may see what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.build import ConfigError
from vdx.models.attention import CrossAttention, SelfAttention, attend
from vdx.models.layers import rope_table
from vdx.models.mixers import MIXERS, PATTERNS, MixContext
from vdx.models.transformer import REMAT, SIZES, Transformer, modulate
from vdx.types import Ports

GRID, WIDTH, HEADS = (3, 2, 4), 24, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, *GRID, WIDTH))
X32 = jnp.asarray(X, jnp.float32)
CONTEXT = MixContext(rope=rope_table(GRID, WIDTH // HEADS))
# Whether the token at place a = (t, h, w) sees the one at b.
SEES = {"full": lambda a, b: True, "space": lambda a, b: a[0] == b[0],
        "time": lambda a, b: a[1:] == b[1:]}
PLACES = list(np.ndindex(GRID))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def dense(p, x):
    return x @ p["kernel"].astype(np.float64) + p["bias"]


def rms(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def heads_apart(x):
    return x.reshape(*x.shape[:-1], HEADS, -1)


def rotate(x):
    """Complex form, from the table that test_layers checks."""
    angle = np.arctan2(CONTEXT.rope[1], CONTEXT.rope[0]).astype(np.float64)
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def mix_by_loop(p, x, sees):
    """One clip [t h w d], token by token and head by head."""
    q, k = (rotate(heads_apart(rms(p[f"{n}_norm"], dense(p[n], x)))) for n in "qk")
    v, out = heads_apart(dense(p["v"], x)), np.zeros(x.shape)
    for a in PLACES:
        seen = [b for b in PLACES if sees(a, b)]
        for n in range(HEADS):
            scores = np.array([q[a][n] @ k[b][n] for b in seen]) / np.sqrt(WIDTH // HEADS)
            mixed = softmax(scores) @ np.array([v[b][n] for b in seen])
            out[a][n * len(mixed):(n + 1) * len(mixed)] = mixed
    return dense(p["out"], out)


@pytest.fixture(scope="module", params=MIXERS)
def mixer(request, randomise):
    """(name, parameters, jitted function of params and x)."""
    module = MIXERS[request.param](heads=HEADS)
    params = randomise(jax.eval_shape(module.init, jax.random.key(0), X32, CONTEXT)["params"])
    return request.param, params, jax.jit(lambda p, x: module.apply({"params": p}, x, CONTEXT))


def test_mixers_are_their_definitions(mixer):
    name, params, run = mixer
    want = np.stack([mix_by_loop(params, clip, SEES[name]) for clip in X])
    np.testing.assert_allclose(run(params, X32), want, atol=5e-6)


def test_mixers_see_what_they_should_and_nothing_else(mixer):
    name, params, run = mixer
    jacobian = jax.jit(jax.jacrev(lambda x: run(params, x).sum(-1)))(X32)    # b a.. b b.. d
    touched = np.abs(jacobian).max(-1)
    for a in PLACES:
        for b in PLACES:
            assert (touched[(0, *a, 0, *b)] > 0) == SEES[name](a, b), (a, b)
    assert not touched[0, ..., 1, :, :, :].any()                       # nor another clip


def test_mixers_in_bfloat16_are_close(mixer):
    name, params, run = mixer
    half = MIXERS[name](heads=HEADS, dtype=jnp.bfloat16)
    got = half.apply({"params": params}, X32.astype(jnp.bfloat16), CONTEXT)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(run(params, X32))
    assert np.linalg.norm(got.astype(np.float32) - want) < 0.02 * np.linalg.norm(want)


def cross_by_loop(p, x, tokens, mask):
    q, k = (heads_apart(rms(p[f"{n}_norm"], dense(p[n], y))) for n, y in zip("qk", (x, tokens),
                                                                        strict=True))
    v, out = heads_apart(dense(p["v"], tokens)), np.zeros(x.shape)
    for clip in range(len(x)):
        keep = mask[clip]
        for a in PLACES:
            at = (clip, *a)
            out[at] = np.concatenate([
                softmax(k[clip][keep, n] @ q[at][n] / np.sqrt(WIDTH // HEADS)) @ v[clip][keep, n]
                for n in range(HEADS)])
    return dense(p["out"], out)


@pytest.fixture(scope="module")
def cross(randomise):
    """(parameters, tokens, mask, jitted function of tokens and mask)."""
    module, tokens = CrossAttention(HEADS), RNG.normal(size=(2, 5, 7)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
    params = randomise(jax.eval_shape(module.init, jax.random.key(0), X32, tokens, mask)["params"])
    return params, tokens, mask, jax.jit(
        lambda tokens, mask: module.apply({"params": params}, X32, tokens, mask))


def test_cross_attention_is_its_definition(cross):
    params, tokens, mask, run = cross
    want = cross_by_loop(params, X, tokens.astype(np.float64), mask)
    np.testing.assert_allclose(run(tokens, mask), want, atol=5e-6)


def test_cross_attention_ignores_padding(cross):
    _, tokens, mask, run = cross
    spoilt = np.where(mask[..., None], tokens, 1e3)
    np.testing.assert_array_equal(run(spoilt, mask), run(tokens, mask))
    shorter = run(tokens[:, :4], mask[:, :4])
    np.testing.assert_allclose(run(tokens, mask), shorter, atol=1e-6)
    assert np.abs(run(spoilt, mask | True) - run(tokens, mask)).max() > 0.01


def test_self_attention_is_its_definition(randomise):
    module, mask = SelfAttention(HEADS), np.array([[1, 1, 0], [0, 1, 1]], bool)
    x = RNG.normal(size=(2, 3, WIDTH)).astype(np.float32)
    p = randomise(jax.eval_shape(module.init, jax.random.key(0), x, mask)["params"])
    q, k, v = (heads_apart(dense(p[n], x)) for n in "qkv")
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(WIDTH // HEADS)
    weights = softmax(np.where(mask[:, None, None], scores, -np.inf))
    want = dense(p["out"], np.einsum("bnqk,bknd->bqnd", weights, v).reshape(x.shape))
    np.testing.assert_allclose(module.apply({"params": p}, x, mask), want, atol=5e-6)


def test_softmax_runs_in_float32():
    """Two near scores, which bfloat16 cannot tell apart at their size."""
    q = jnp.full((1, 1, 1, 4), 16.0, jnp.bfloat16)
    k = jnp.asarray([[16.0] * 4, [16.0] * 3 + [16.125]], jnp.bfloat16)[None, :, None]
    v = jnp.asarray([0.0, 1.0], jnp.bfloat16)[None, :, None, None] * jnp.ones(4, jnp.bfloat16)
    want = 1 / (1 + np.exp(-16 * 0.125 / 2))
    np.testing.assert_allclose(attend(q, k, v).astype(np.float32), want, atol=0.01)


def test_modulation():
    shift, scale = RNG.normal(size=(2, 2, 1, 1, 1, WIDTH))
    plain = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-6)
    got = modulate(X32, jnp.asarray(shift, jnp.float32), jnp.asarray(scale, jnp.float32))
    np.testing.assert_allclose(got, plain * (1 + scale) + shift, atol=1e-5)


# The transformer as a whole.

CLIP = RNG.normal(size=(2, 4, 4, 8, 3)).astype(np.float32)
TIME = np.array([10.0, 700.0], np.float32)
PORTS = Ports(tokens=RNG.normal(size=(2, 5, 24)).astype(np.float32),
              tokens_mask=np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool),
              vector=RNG.normal(size=(2, 24)).astype(np.float32))
SMALL = dict(width=24, depth=4, heads=2, patch=(2, 2, 2))


def shapes(model, x=CLIP, ports=PORTS):
    return jax.eval_shape(model.init, jax.random.key(0), x, TIME, ports)["params"]


@pytest.fixture(scope="module")
def value_and_grad(quick):
    return lambda model: _value_and_grad(model, quick)


def _value_and_grad(model, quick):
    def loss(params):
        out = model.apply({"params": params}, CLIP, TIME, PORTS)
        return jnp.square(out).mean(), out
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick)


@pytest.fixture(scope="module")
def reference(randomise, value_and_grad):
    """(parameters, outputs, gradients) of the factorized transformer without remat."""
    model = Transformer(**SMALL, pattern="factorized")
    params = randomise(shapes(model))
    (_, out), grads = value_and_grad(model)(params)
    return params, np.asarray(out), grads


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("remat", [r for r in REMAT if r != "none"])
def test_remat_changes_nothing(remat, reference, value_and_grad):
    params, out, grads = reference
    run = value_and_grad(Transformer(**SMALL, pattern="factorized", remat=remat))
    (_, got), got_grads = run(params)
    assert relative(got, out) < 1e-6
    assert max(jax.tree.leaves(jax.tree.map(relative, got_grads, grads))) < 1e-5
    # and it does recompute: the backward pass has more matrix products
    count = lambda run: str(jax.make_jaxpr(run.__wrapped__)(params)).count("dot_general")
    plain = value_and_grad(Transformer(**SMALL, pattern="factorized"))
    assert count(run) > count(plain)


def test_scan_is_the_loop(reference, value_and_grad):
    """Periods scanned over the depth against the same layers written one after another."""
    params, out, grads = reference
    once = Transformer(**{**SMALL, "depth": 4}, pattern=PATTERNS["factorized"] * 2)
    layers = params["layers"]
    unrolled = {f"block_{2 * i + j}": jax.tree.map(lambda v, i=i: v[i:i + 1], layers[f"block_{j}"])
                for i in range(2) for j in range(2)}
    (_, got), got_grads = value_and_grad(once)({**params, "layers": unrolled})
    assert relative(got, out) < 1e-6
    want = jax.tree.map(lambda v: v[1:], grads["layers"]["block_0"])
    assert max(jax.tree.leaves(jax.tree.map(
        relative, got_grads["layers"]["block_2"], want))) < 1e-5


def test_bfloat16_is_close_to_float32(reference, value_and_grad):
    params, out, grads = reference
    (_, got), got_grads = value_and_grad(
        Transformer(**SMALL, pattern="factorized", dtype="bfloat16"))(params)
    assert got.dtype == jnp.float32 and 1e-4 < relative(got, out) < 0.03
    flat = lambda tree: np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)])
    assert relative(flat(got_grads), flat(grads)) < 0.05
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(got_grads))


@pytest.mark.parametrize("pattern", [*PATTERNS, ("space", "full", "time", "time")])
def test_a_fresh_transformer_predicts_zero_and_a_trained_one_sees_everything(pattern, randomise):
    model = Transformer(**SMALL, pattern=pattern)
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, TIME, PORTS))
    tree = shapes(model)
    zero_ends = randomise(tree)
    zero_ends["unpatch"] = jax.tree.map(np.zeros_like, zero_ends["unpatch"])
    assert not np.asarray(run(zero_ends, CLIP)).any()
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}
    params = randomise(tree)
    changed = CLIP.copy()
    changed[0, -1, -1, -1] += 1                       # one pixel of one clip
    difference = np.abs(run(params, changed) - run(params, CLIP)).max((-1,))
    assert (difference[0] > 0).all() and not difference[1].any()


def test_ports_enter_where_they_say(reference):
    params, out, _ = reference
    model = Transformer(**SMALL, pattern="factorized")
    run = jax.jit(lambda ports: model.apply({"params": params}, CLIP, TIME, ports))
    add = RNG.normal(size=(2, 2, 2, 4, 24)).astype(np.float32)
    assert relative(run(PORTS.replace(add=0 * add)), out) < 1e-6
    for field, value in {"add": add, "vector": PORTS.vector + 1, "tokens": PORTS.tokens + 1,
                         "tokens_mask": None}.items():
        assert relative(run(PORTS.replace(**{field: value})), out) > 0.01, field
    wide = shapes(model, ports=PORTS.replace(concat=CLIP))["patch"]["kernel"].shape
    assert wide == (2 * 2 * 2 * 6, 24)


def test_a_time_for_each_frame(reference):
    params, out, _ = reference
    model = Transformer(**SMALL, pattern="factorized")
    run = jax.jit(lambda time: model.apply({"params": params}, CLIP, time, PORTS))
    same = np.repeat(TIME[:, None], 4, 1)
    assert relative(run(same), out) < 1e-6
    other = run(same * [0, 1, 1, 1])         # patches of two frames take the time of the first
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
        control_scale=np.array([1.0, 0.5], np.float32))
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
    np.testing.assert_allclose(run(params, ports.replace(control_scale=np.zeros(2, np.float32))),
                               plain, atol=1e-6)
    fresh = jax.tree.map(np.zeros_like, params["layers"]["hint"])     # as a network begins
    silent = {**params, "layers": {**params["layers"], "hint": fresh}}
    np.testing.assert_allclose(run(silent, ports), plain, atol=1e-6)


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
    ports = Ports(tokens=jax.ShapeDtypeStruct((1, 1, width), jnp.float32),
                  tokens_mask=jax.ShapeDtypeStruct((1, 1), bool))
    tree = jax.eval_shape(model.init, jax.random.key(0), x, jnp.zeros(1), ports)["params"]
    project = 4096 * width + width + width * width + width
    millions = (sum(v.size for v in jax.tree.leaves(tree)) + project) / 1e6
    print(f"{size}: {millions:.0f}M")
    low, high = {"tiny": (3, 8), "S": (20, 40), "B": (100, 160), "L": (350, 450),
                 "XL": (550, 700), "wan_1p3b": (1400, 1440), "wan_5b": (4950, 5050),
                 "wan_14b": (14200, 14350)}[size]
    assert low < millions < high


@pytest.mark.parametrize(("fields", "message"), [
    ({"size": "XXL"}, "Did you mean 'XL'"), ({"pattern": "fullest"}, "Did you mean 'full'"),
    ({"pattern": ("space", "tme")}, "Did you mean 'time'"),
    ({"depth": 3, "pattern": "factorized"}, "not a multiple of the pattern"),
    ({"width": 30, "heads": 6}, "30 over 6 heads is not an even number"),
])
def test_dims_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(**fields).dims()


def test_a_clip_that_patches_do_not_tile():
    assert Transformer(patch=(2, 4, 4)).grid((4, 8, 16, 3)) == (2, 2, 4)
    with pytest.raises(ValueError, match=r"\(4, 8, 18\).*does not divide into patches"):
        Transformer(patch=(2, 4, 4)).grid((4, 8, 18, 3))
