"""Attention and the mixers against plain loops, what may see what, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError, build
from vdx.models.attention.backends import CONTEXTS, attend
from vdx.models.attention.layers import CrossAttention, SelfAttention
from vdx.models.mixers.context import MixContext
from vdx.models.mixers.table import MIXERS
from vdx.models.mixers.time_attention import MAX_RELATIVE_DISTANCE
from vdx.models.positions import rope_table
from vdx.models.shapes import init_shapes
from vdx.parallel import MeshSpec, batch_sharding, param_shardings

GRID, WIDTH, HEADS = (3, 2, 4), 24, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, *GRID, WIDTH))
X32 = jnp.asarray(X, jnp.float32)
CONTEXT = MixContext(rope=rope_table(GRID, WIDTH // HEADS))
PLACES = list(np.ndindex(GRID))


def near(a, b):
    """Within a kernel of three along each axis."""
    return np.abs(np.subtract(a, b)).max() <= 1


# case -> (spec, whether the token at place a = (t, h, w) sees the one at b).
CASES = {
    "full": ({}, lambda a, b: True),
    "full, blocks": ({"block": 2}, lambda a, b: a[0] // 2 >= b[0] // 2),
    "space": ({}, lambda a, b: a[0] == b[0]),
    "time": ({}, lambda a, b: a[1:] == b[1:]),
    "time, causal": ({"block": 1}, lambda a, b: a[1:] == b[1:] and a[0] >= b[0]),
    "time, window": (
        {"window": 1, "positions": "relative"},
        lambda a, b: a[1:] == b[1:] and near(a, b),
    ),
    "time, both": (
        {"window": 1, "block": 1, "positions": "none", "qk_norm": False},
        lambda a, b: a[1:] == b[1:] and 0 <= a[0] - b[0] <= 1,
    ),
    "time, sink": (
        {"block": 1, "window": 1, "sink": 1},
        lambda a, b: a[1:] == b[1:] and a[0] >= b[0],
    ),
    "conv": ({}, near),
    "conv, causal": (
        {"kernel": (2, 1, 1), "causal": True, "padding": "edge"},
        lambda a, b: a[1:] == b[1:] and 0 <= a[0] - b[0] <= 1,
    ),
    "conv, separable": ({"separable": True}, near),
    "recurrent": ({}, lambda a, b: a[1:] == b[1:] and a[0] >= b[0]),
    "recurrent, both": ({"bidirectional": True}, lambda a, b: a[1:] == b[1:]),
    "none": ({}, lambda a, b: a == b),
}
CASES = {case: ({"name": case.split(",")[0], **spec}, sees) for case, (spec, sees) in CASES.items()}
# Fields change what is seen, and the rest little: their other tests are slow ones.
each_row = pytest.mark.parametrize(
    "case",
    [case if case in MIXERS else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
ATTENTION = [case for case, (spec, _) in CASES.items() if spec["name"] not in ("conv", "recurrent")]


def mixer_of(case, **fields):
    return build(CASES[case][0], MIXERS, "test", heads=HEADS, **fields)


def test_every_row_has_a_case():
    assert {spec["name"] for spec, _ in CASES.values()} == set(MIXERS)


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


def mix_by_loop(p, x, spec, sees):
    """One clip [t h w d], token by token and head by head."""
    places, out = list(np.ndindex(x.shape[:3])), np.zeros(x.shape)
    if spec["name"] == "none":  # who sees but itself attends to itself
        p = {**p, **dict.fromkeys("qk", p["v"])}
        spec = {"qk_norm": False, "positions": "none"}
    q, k, v = (dense(p[n], x) for n in "qkv")
    if spec.get("qk_norm", True):
        q, k = rms(p["q_norm"], q), rms(p["k_norm"], k)
    q, k, v = (heads_apart(y) for y in (q, k, v))
    if spec.get("positions", "rope") == "rope":
        q, k = rotate(q), rotate(k)
    for a in places:
        seen = [b for b in places if sees(a, b)]
        for n in range(HEADS):
            scores = np.array([q[a][n] @ k[b][n] for b in seen]) / np.sqrt(WIDTH // HEADS)
            if "distance_table" in p:
                scores += [
                    p["distance_table"][
                        MAX_RELATIVE_DISTANCE
                        + np.clip(b[0] - a[0], -MAX_RELATIVE_DISTANCE, MAX_RELATIVE_DISTANCE),
                        n,
                    ]
                    for b in seen
                ]
            mixed = softmax(scores) @ np.array([v[b][n] for b in seen])
            out[a][n * len(mixed) : (n + 1) * len(mixed)] = mixed
    return dense(p["out"], out)


@pytest.fixture(scope="module")
def mixer(randomise):
    """mixer(case): (module, parameters, function of params and x, the same jitted)."""

    @functools.cache
    def make(case):
        module = mixer_of(case)
        params = randomise(init_shapes(module, X32, CONTEXT))
        run = lambda p, x: module.apply({"params": p}, x, CONTEXT)
        return module, params, run, jax.jit(run)

    return make


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_its_definition(case, mixer):
    _, params, _, run = mixer(case)
    want = np.stack([mix_by_loop(params, clip, *CASES[case]) for clip in X])
    np.testing.assert_allclose(run(params, X32), want, atol=5e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ATTENTION])
def test_mixers_see_what_they_should_and_nothing_else(case, mixer):
    """Attention that is its definition sees what the definition sums over."""
    _, params, run, _ = mixer(case)
    jacobian = jax.jit(jax.jacrev(lambda x: run(params, x).sum(-1)))
    touched = np.abs(jacobian(X32)).max(-1)  # b a.. b b..
    for a in PLACES:
        for b in PLACES:
            assert (touched[(0, *a, 0, *b)] > 0) == CASES[case][1](a, b), (a, b)
    assert not touched[0, ..., 1, :, :, :].any()  # nor another clip


@pytest.mark.parametrize("case", CASES)
def test_temporal_is_what_sees_one_place_in_more_than_one_frame(case):
    seen = {(a, b) for a in PLACES for b in PLACES if CASES[case][1](a, b)}
    assert mixer_of(case).temporal == (
        all(a[1:] == b[1:] for a, b in seen) and len(seen) > len(PLACES)
    )


@each_row
def test_mixers_in_bfloat16_are_close(case, mixer):
    _, params, _, run = mixer(case)
    half = mixer_of(case, dtype=jnp.bfloat16)
    got = jax.jit(half.apply)({"params": params}, X32.astype(jnp.bfloat16), CONTEXT)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(run(params, X32))
    assert np.linalg.norm(got.astype(np.float32) - want) < 0.02 * np.linalg.norm(want)


def on_eight_devices(mixer, case, **how):
    """Values and gradients, with tokens, features and weights split, against those of one."""
    module, params, *_ = mixer(case)
    x = RNG.normal(size=(2, 4, 2, 4, WIDTH)).astype(np.float32)
    context = MixContext(rope=rope_table(x.shape[1:4], WIDTH // HEADS), **how)

    def loss(params, x):
        y = module.apply({"params": params}, x, context)
        return jnp.square(y).sum(), y

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    want = jax.jit(run)(params, x)
    mesh = MeshSpec(data=1, fsdp=2, context=2, tensor=2).make()
    with jax.set_mesh(mesh):
        shardings = param_shardings(mesh, params), batch_sharding(mesh)
        got = jax.jit(run, in_shardings=shardings)(*jax.device_put((params, x), shardings))
    norm, leaves = np.linalg.norm, dict(jax.tree_util.tree_leaves_with_path(want))
    for path, ours in jax.tree_util.tree_leaves_with_path(got):
        # Some are zero but for rounding: without a norm, that of the keys' bias.
        most = 5e-6 * norm(leaves[path]) + 1e-6 * norm(want[1][1])
        assert norm(ours - leaves[path]) <= most, path


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in ("full", "conv", "recurrent") else pytest.mark.slow)
        for case in CASES
    ],
)
def test_on_eight_devices_it_is_that_of_one(case, mixer):
    on_eight_devices(mixer, case)


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
def test_however_its_tokens_meet_on_eight_devices(context, mixer):
    """As above, with kernels that XLA cannot split, and keys that travel."""
    on_eight_devices(mixer, "full", attention="blockwise", context_parallel=context)


@pytest.mark.parametrize("grid", [(128, 2, 2), (2, 12, 12)])
@each_row
def test_the_cost_is_what_xla_counts(case, grid):
    """XLA also counts what is no matrix product: a little more. A loop it counts once, so that
    attention is not to run in blocks. What it counts is the program before it compiles it."""
    module, width = mixer_of(case), 256
    grid = (8, *grid[1:]) if "blocks" in case else grid  # each is a part of the program
    x = jax.ShapeDtypeStruct((1, *grid, width), jnp.float32)
    context = MixContext(rope=rope_table(grid, width // HEADS), attention="xla")
    params = init_shapes(module, x, context)
    program = jax.jit(lambda p, x: module.apply({"params": p}, x, context))
    counted = program.lower(params, x).cost_analysis()["flops"]
    assert 1 <= counted / module.flops(grid, width) < 1.02


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"block": 1, "window": 2, "positions": "relative"},
        pytest.param({"positions": "relative"}, marks=pytest.mark.slow),
    ],
)
def test_attention_over_time_depends_on_distances_alone(spec, randomise):
    """The same clip a frame later in a longer one, far from both ends: the same answer. Distances
    beyond MAX_RELATIVE_DISTANCE share a bias, so that clips may be longer than any in training."""
    module = MIXERS["time"](heads=HEADS, **{"window": 3, **spec})
    clip = RNG.normal(size=(1, 2 * MAX_RELATIVE_DISTANCE + 8, 1, 1, WIDTH)).astype(np.float32)
    context = MixContext(rope=rope_table((clip.shape[1], 1, 1), WIDTH // HEADS))
    image = init_shapes(
        module,
        clip[:, :1],
        MixContext(rope=rope_table((1, 1, 1), WIDTH // HEADS)),
    )
    params = randomise(image)  # as made for one frame
    run = jax.jit(lambda x: module.apply({"params": params}, x, context))
    one, later = run(clip), run(np.roll(clip, 1, 1))
    inside = slice(4, -4)
    np.testing.assert_allclose(np.roll(one, 1, 1)[:, inside], later[:, inside], atol=1e-5)


def test_distances_beyond_the_reach_share_a_bias(randomise):
    module = MIXERS["time"](heads=HEADS, positions="relative")
    clip = RNG.normal(size=(1, MAX_RELATIVE_DISTANCE + 4, 1, 1, WIDTH)).astype(np.float32)
    params = randomise(init_shapes(module, clip, CONTEXT))
    want = mix_by_loop(params, clip[0], {"name": "time", "positions": "relative"}, CASES["time"][1])
    got = jax.jit(lambda x: module.apply({"params": params}, x, CONTEXT))(clip)[0]
    np.testing.assert_allclose(got, want, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("time", {"positions": "absolute"}, "known: rope, relative, none"),
        ("space", {"positions": "relative"}, "known: rope, none"),
        ("time", {"window": 0}, r"test\.window = 0 is out of range, expected int >= 1"),
        ("conv", {"kernel": (2, 1, 1)}, "sizes are odd"),
        ("conv", {"kernel": (2, 1, 2), "causal": True}, "sizes are odd"),
        (
            "conv",
            {"padding": "mirror"},
            r"test\.padding: unknown name 'mirror'\. Known: zeros, edge\.",
        ),
    ],
)
def test_fields_that_cannot_be(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        build({"name": name, **fields}, MIXERS, "test", heads=2)


def cross_by_loop(p, x, tokens, mask):
    q, k = (
        heads_apart(rms(p[f"{n}_norm"], dense(p[n], y)))
        for n, y in zip("qk", (x, tokens), strict=True)
    )
    v, out = heads_apart(dense(p["v"], tokens)), np.zeros(x.shape)
    for clip in range(len(x)):
        keep = mask[clip]
        for a in PLACES:
            at = (clip, *a)
            out[at] = np.concatenate(
                [
                    softmax(k[clip][keep, n] @ q[at][n] / np.sqrt(WIDTH // HEADS))
                    @ v[clip][keep, n]
                    for n in range(HEADS)
                ]
            )
    return dense(p["out"], out)


@pytest.fixture(scope="module")
def cross(randomise):
    """(parameters, tokens, mask, jitted function of tokens and mask)."""
    module, tokens = CrossAttention(HEADS), RNG.normal(size=(2, 5, 7)).astype(np.float32)
    mask = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], bool)
    params = randomise(init_shapes(module, X32, tokens, mask))
    return (
        params,
        tokens,
        mask,
        jax.jit(lambda tokens, mask: module.apply({"params": params}, X32, tokens, mask)),
    )


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
    p = randomise(init_shapes(module, x, mask))
    q, k, v = (heads_apart(dense(p[n], x)) for n in "qkv")
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(WIDTH // HEADS)
    weights = softmax(np.where(mask[:, None, None], scores, -np.inf))
    want = dense(p["out"], np.einsum("bnqk,bknd->bqnd", weights, v).reshape(x.shape))
    np.testing.assert_allclose(module.apply({"params": p}, x, mask), want, atol=5e-6)


def test_softmax_runs_in_float32():
    """Two near scores, which bfloat16 does not separate at their size."""
    q = jnp.full((1, 1, 1, 4), 16.0, jnp.bfloat16)
    k = jnp.asarray([[16.0] * 4, [16.0] * 3 + [16.125]], jnp.bfloat16)[None, :, None]
    v = jnp.asarray([[0.0] * 4, [1.0] * 4], jnp.bfloat16)[None, :, None]
    want = 1 / (1 + np.exp(-16 * 0.125 / 2))
    np.testing.assert_allclose(attend(q, k, v).astype(np.float32), want, atol=0.01)
