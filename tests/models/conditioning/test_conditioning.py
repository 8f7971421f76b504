"""Signals: what is kept arrives, what is dropped is the null value, clip by clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.models.conditioning.conditioning import Conditioning, merge
from vdx.models.conditioning.table import SIGNALS
from vdx.models.denoiser import Denoiser
from vdx.models.encoders.text import ENCODERS
from vdx.models.shapes import init_shapes, new_shapes
from vdx.types import Ports

WIDTH, LENGTH = 16, 16
BYTES = {
    "name": "bytes",
    "length": LENGTH,
    "width": 12,
    "depth": 1,
    "heads": 2,
    "words": 6,
    "buckets": 64,
}
FIELDS = {
    "text": {"encoder": BYTES},
    "embeddings": {"features": 6},
    "image_tokens": {"features": 6, "positions": 3},
    "concat": {"channels": 2},
    "control": {"channels": 2},
    "depth": {"port": "control"},
    "known_frames": {"channels": 2},
    "reference": {
        "encoder": {"name": "patches", "width": 12, "heads": 2},
        "height": 8,
        "columns": 16,
    },
}
NO_NULL = (
    "image_tokens",
    "concat",
    "control",
    "known_frames",
    "reference",
    "depth",
    "pose",
    "flow",
    "camera",
    "fps_class",
)  # zero stands for what is dropped
RNG = np.random.default_rng(0)
TOKENIZE = ENCODERS["bytes"](length=LENGTH).tokenizer()


def captions(*texts):
    ids, mask = zip(*map(TOKENIZE, texts), strict=True)
    return {"text": np.stack(ids), "text_mask": np.stack(mask)}


BATCHES = {
    "text": (captions("a red ball", "blue"), captions("two cats", "")),
    "embeddings": tuple(
        {"text": RNG.normal(size=(2, 3, 6)).astype(np.float32), "text_mask": np.array(mask, bool)}
        for mask in ([[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]])
    ),
    "fps": ({"fps": np.array([8.0, 24.0], np.float32)}, {"fps": np.array([12, 30.0], np.float32)}),
    "fps_class": (
        {"fps": np.array([16.0, 24.0], np.float32)},
        {"fps": np.array([24.0, 16.0], np.float32)},
    ),
    "num_frames": (
        {"num_frames": np.array([16, 32], np.int32)},
        {"num_frames": np.array([17, 8], np.int32)},
    ),
    **{
        name: tuple({name: RNG.normal(size=shape).astype(np.float32)} for _ in range(2))
        for name, shape in {
            "image_tokens": (2, 3, 6),
            "concat": (2, 2, 4, 4, 2),
            "control": (2, 2, 4, 4, 2),
            "depth": (2, 2, 4, 4, 1),
            "pose": (2, 2, 4, 4, 3),
            "flow": (2, 2, 4, 4, 3),
            "camera": (2, 2, 4, 4, 6),
        }.items()
    },
    "known_frames": tuple(
        {
            "known": RNG.normal(size=(2, 2, 4, 4, 2)).astype(np.float32),
            "known_mask": np.array(mask, np.float32),
        }
        for mask in ([[1, 0], [1, 1]], [[1, 1], [0, 1]])
    ),
    "reference": tuple(
        {"reference": RNG.integers(0, 256, (2, 8, 16, 3)).astype(np.uint8)} for _ in range(2)
    ),
    "actions": (
        {"actions": np.array([[0, 1], [2, 3]], np.int32)},
        {"actions": np.array([[0, 4], [3, 2]], np.int32)},
    ),
    "motion": (
        {"motion": np.array([0.0, 3.0], np.float32)},
        {"motion": np.array([1.0, 4.0], np.float32)},
    ),
}


def differences(a: Ports, b: Ports) -> np.ndarray:
    """[b], the largest difference of what the network can see."""

    def seen(p):
        masked = jax.tree.map(
            lambda x, mask: jnp.where(mask[..., None], x, 0.0), p.tokens, p.tokens_mask
        )
        control = jax.tree.map(
            lambda x, scale: x * scale[:, None, None, None, None], p.control, p.control_scale
        )
        return [masked, control, p.image_tokens, p.vector, p.modulation, p.concat]

    pairs = zip(seen(a), seen(b), strict=True)
    return np.max([np.abs(x - y).reshape(len(x), -1).max(1) for x, y in pairs if x is not None], 0)


@pytest.fixture(scope="module", params=SIGNALS)
def signal(request, randomise):
    """(name, batch, another batch, jitted function of batch and drop [b])."""
    name = request.param
    module = Conditioning(WIDTH, {name: FIELDS.get(name, {})})
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), module.dummy_batch(), {name: jnp.zeros(1, bool)}
    ).get("params", {})
    params = randomise(shapes)
    run = jax.jit(
        lambda batch, drop: module.apply({"params": params}, batch, {name: jnp.asarray(drop)})
    )
    return name, *BATCHES[name], run


def test_what_is_kept_arrives_and_what_is_dropped_is_the_same_for_all(signal):
    _, batch, other, run = signal
    keep, drop = [False, False], [True, True]
    assert (differences(run(batch, keep), run(other, keep)) > 1e-3).all()
    assert (differences(run(batch, drop), run(other, drop)) == 0).all()
    assert (differences(run(batch, drop), run(batch, keep)) > 1e-3).all()


def test_clips_are_dropped_one_by_one(signal):
    _, batch, _, run = signal
    kept, dropped = run(batch, [False, False]), run(batch, [True, True])
    mixed = run(batch, [True, False])
    np.testing.assert_array_equal(differences(mixed, dropped) == 0, [True, False])
    np.testing.assert_array_equal(differences(mixed, kept) == 0, [False, True])


@pytest.mark.parametrize("name", [name for name in SIGNALS if name not in NO_NULL])
def test_a_null_value_is_learned(name, randomise):
    """Its gradient is not zero when the signal is dropped."""
    batch, _ = BATCHES[name]
    module = Conditioning(WIDTH, {name: FIELDS.get(name, {})})
    drop = {name: jnp.ones(2, bool)}
    params = randomise(init_shapes(module, batch, drop))

    def loss(params):
        p = module.apply({"params": params}, batch, drop)
        return sum(jnp.sum(jnp.sin(v)) for v in (p.tokens, p.vector) if v is not None)

    grads = jax.jit(jax.grad(loss))(params)[name]
    null = {
        "text": lambda: grads["encoder"]["bytes"]["embedding"][1],
        "actions": lambda: grads["embed"]["embedding"][5],
    }.get(name, lambda: grads["null"])()
    assert np.abs(null).max() > 0
    if name == "text":  # the caption itself has no part in it
        assert not np.asarray(grads["encoder"]["bytes"]["embedding"][3:]).any()


def test_dropped_text_is_the_empty_caption(randomise):
    module = Conditioning(WIDTH, {"text": FIELDS["text"]})
    example, drop = module.dummy_batch(), lambda *d: {"text": jnp.array(d)}
    params = randomise(init_shapes(module, example, drop(False)))
    run = jax.jit(lambda batch, drop: module.apply({"params": params}, batch, drop))
    got = run(captions("a red ball"), drop(True))
    want = run(captions(""), drop(False))
    assert differences(got, want) == 0
    np.testing.assert_array_equal(got.tokens_mask, want.tokens_mask)


def test_drop_rates_and_independence():
    module = Conditioning(
        WIDTH,
        {
            "fps": {"dropout": 0.1},
            "num_frames": {"dropout": 0.5},
            "text": {"encoder": BYTES, "dropout": 0.0},
        },
    )
    clips = 20_000
    drop = jax.tree.map(np.asarray, module.random_drop(jax.random.key(0), clips))
    assert not drop["text"].any()
    for name, rate in (("fps", 0.1), ("num_frames", 0.5)):
        sigma = np.sqrt(rate * (1 - rate) / clips)
        assert abs(drop[name].mean() - rate) < 4 * sigma
    both = (drop["fps"] & drop["num_frames"]).mean()  # signals are independent
    assert abs(both - 0.05) < 4 * np.sqrt(0.05 * 0.95 / clips)
    after = (drop["fps"][1:] & drop["fps"][:-1]).mean()  # and so are clips
    assert abs(after - 0.01) < 4 * np.sqrt(0.01 * 0.99 / clips)
    again = module.random_drop(jax.random.key(1), clips)["fps"]
    assert (np.asarray(again) != drop["fps"]).any()


def test_merge():
    tokens, wide = np.ones((1, 2, 3)), np.zeros((1, 4, 3))
    one = Ports(
        tokens=tokens,
        tokens_mask=np.ones((1, 2), bool),
        vector=np.ones((1, 3)),
        concat=np.ones((1, 1, 1, 1, 2)),
        add=np.ones((1, 1, 1, 1, 3)),
    )
    two = Ports(
        tokens=wide,
        tokens_mask=np.zeros((1, 4), bool),
        vector=2 * np.ones((1, 3)),
        concat=np.zeros((1, 1, 1, 1, 1)),
        add=np.ones((1, 1, 1, 1, 3)),
    )
    got = merge([one, Ports(), two])
    np.testing.assert_array_equal(got.tokens, np.concatenate([tokens, wide], 1))
    np.testing.assert_array_equal(got.tokens_mask, [[1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(got.vector, [[3, 3, 3]])
    assert got.concat.shape[-1] == 3 and got.add.max() == 2
    assert merge([]) == Ports()
    seen = merge([Ports(tokens=wide), one]).tokens_mask  # no mask: all are seen
    np.testing.assert_array_equal(seen, [[1, 1, 1, 1, 1, 1]])


def test_embeddings_of_one_length(randomise):
    """Filled up with zeros, which are seen; what the mask hides is zero."""
    module = Conditioning(WIDTH, {"embeddings": {"features": 6, "length": 5}})
    batch, keep = BATCHES["embeddings"][0], {"embeddings": jnp.zeros(2, bool)}
    params = randomise(init_shapes(module, batch, keep))
    apply = jax.jit(lambda batch: module.apply({"params": params}, batch, keep))
    run = lambda text, **other: apply(batch | {"text": text} | other)
    ports = run(batch["text"])
    assert ports.tokens.shape == (2, 5, WIDTH) and ports.tokens_mask is None
    zero = run(np.zeros_like(batch["text"])).tokens[:, 0]
    np.testing.assert_allclose(ports.tokens[:, 3:], jnp.stack([zero, zero], 1), atol=1e-6)
    np.testing.assert_allclose(ports.tokens[0, 2], zero[0], atol=1e-6)  # its mask is False
    with pytest.raises(ConfigError, match=r"Text has 6 tokens; .* at most .* = 5"):
        run(np.zeros((2, 6, 6), np.float32), text_mask=np.ones((2, 6), bool))


def test_image_tokens_of_another_number():
    module = Conditioning(WIDTH, {"image_tokens": {"features": 6, "positions": 4}})
    with pytest.raises(ConfigError, match=r"3 tokens a clip; .*positions = 4"):
        module.init(
            jax.random.key(0), BATCHES["image_tokens"][0], {"image_tokens": jnp.zeros(2, bool)}
        )


SMALL = {"name": "transformer", "width": WIDTH, "depth": 1, "heads": 2, "patch": (2, 4, 4)}


def test_every_signal_changes_the_prediction(randomise):
    # Text, computed before, and what also reads `fps` (seen in test_wan).
    names = [name for name in SIGNALS if name not in ("embeddings", "fps_class")]
    fields = FIELDS | {"depth": {}}  # a port of its own; `control` has the control blocks
    model = Denoiser(SMALL, {name: fields.get(name, {}) for name in names})
    params = randomise(new_shapes(model))
    x = RNG.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
    time = np.array([0.2, 0.7], np.float32)
    run = jax.jit(lambda batch, drop: model.run(params, x, time, batch, drop, method="train_view"))
    batch = {k: v for name in names for k, v in BATCHES[name][0].items()}
    keep = model.drop_masks(2, False)
    plain = run(batch, keep)
    for name in names:
        changed = run(batch | BATCHES[name][1], keep)
        dropped = run(batch, keep | {name: jnp.ones(2, bool)})
        for other in (changed, dropped):
            assert (np.abs(other - plain).max((1, 2, 3, 4)) > 1e-3).all(), name
        again = run(batch | BATCHES[name][1], keep | {name: jnp.ones(2, bool)})
        np.testing.assert_array_equal(again, dropped)


def test_known_frames_are_those_of_the_clip():
    x0 = RNG.normal(size=(2000, 3, 1, 1, 2)).astype(np.float32)
    module = Conditioning(WIDTH, {"known_frames": {"channels": 2, "first": 0.8, "last": 0.3}})
    got = jax.tree.map(np.asarray, module.from_clip(jax.random.key(0), x0))
    mask = got["known_mask"]
    assert not mask[:, 1].any() and abs(mask[:, 0].mean() - 0.8) < 0.04
    assert abs(mask[:, 2].mean() - 0.3) < 0.04
    assert abs((mask[:, 0] * mask[:, 2]).mean() - 0.24) < 0.04  # each on its own
    np.testing.assert_array_equal(got["known"], x0 * mask[..., None, None, None])
    image = module.from_clip(jax.random.key(0), x0[:, :1])["known_mask"]  # both ends at once
    assert abs(np.asarray(image).mean() - 0.86) < 0.04


def test_what_a_batch_lacks_is_dropped_or_asked_for():
    names = {"fps": {}, "depth": {"dropout": 0.0}, "motion": {}}
    model, shape = Denoiser(SMALL, names), (2, 2, 4, 4, 3)
    depth = {"depth": np.zeros((2, 2, 4, 4, 1), np.float32)}
    batch = depth | BATCHES["fps"][0]
    assert model.missing_signals(batch) == {"motion"}
    assert model.fill_missing(batch, shape)["motion"].shape == (2,)
    with pytest.raises(ConfigError, match=r"never trained without 'depth'.*give it"):
        model.missing_signals(BATCHES["fps"][0])


def test_a_vector_for_each_frame_reaches_the_tokens_of_that_frame(randomise):
    """With patches of one frame and no mixing over time, only there."""
    small = SMALL | {"patch": (1, 4, 4), "pattern": ("space",)}
    model = Denoiser(small, {"actions": {}, "fps": {}})
    params = randomise(new_shapes(model))
    x = RNG.normal(size=(1, 3, 4, 4, 3)).astype(np.float32)

    @jax.jit
    def run(actions):
        batch = {"actions": actions, "fps": np.ones(1, np.float32)}
        keep = model.drop_masks(1, False)
        return model.run(params, x, np.ones(1, np.float32), batch, keep, method="train_view")

    one, other = (run(np.array([ids], np.int32)) for ids in ((1, 2, 3), (1, 4, 3)))
    changed = np.abs(one - other).max((0, 2, 3, 4))
    assert changed[1] > 1e-3 and not changed[[0, 2]].any()


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        (
            {"depth": {"port": "tokens"}},
            r"signals\.depth\.port: unknown name 'tokens'\. Known: concat, control\.",
        ),
        (
            {"reference": {"encoder": {"name": "patches"}, "height": 12}},
            "does not divide into patches",
        ),
        ({"txt": {}}, "Did you mean 'text'"),
        ({"fps": {"dropuot": 1}}, "Did you mean 'dropout'"),
        ({"text": {"encoder": {"name": "byte"}}}, "Did you mean 'bytes'"),
        (
            {"text": {"encoder": BYTES | {"heads": 5}}},
            "width = 12 over heads = 5; choose a multiple",
        ),
        ({"text": {"encoder": {"name": "minilm"}}}, "unknown name 'minilm'"),  # it is not trained
    ],
)
def test_signals_that_cannot_be(signals, message):
    with pytest.raises(ConfigError, match=message):
        Denoiser(SMALL, signals).new_params(jax.random.key(0))


def test_embeddings_of_another_width():
    module = Conditioning(WIDTH, {"embeddings": {"features": 7}})
    with pytest.raises(ConfigError, match=r"are 6 wide.*features = 7"):
        module.init(jax.random.key(0), BATCHES["embeddings"][0], {"embeddings": jnp.zeros(2, bool)})


def test_a_signal_that_is_no_section():
    module = Conditioning(WIDTH, {"fps": 5})
    with pytest.raises(ConfigError, match=r"config\.model\.signals\.fps = 5 is no section"):
        module.signal("fps", parent=None)
