"""T5 encoders against transformers', their tables of keys, and their prompts."""

import jax
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.interop.keymap import WeightsError, export, gather
from vdx.interop.t5 import t5_from_config, t5_rows
from vdx.models.encoders import t5
from vdx.models.encoders.t5 import SIZES, T5Encoder, distance_buckets
from vdx.models.shapes import init_shapes
from vdx.parallel import MeshSpec, batch_sharding, param_shardings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = dict(
    vocab_size=50,
    d_model=16,
    d_kv=6,
    d_ff=32,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    feed_forward_proj="gated-gelu",
)
KINDS = {"umt5": ("UMT5Config", "UMT5EncoderModel"), "t5": ("T5Config", "T5EncoderModel")}
LENGTHS = np.array([20, 7, 1, 13])
IDS = np.random.default_rng(0).integers(2, 50, (4, 20)).astype(np.int32)
MASK = np.arange(20) < LENGTHS[:, None]


def shapes(model):
    return init_shapes(model, IDS, MASK)


def read(file, model):
    return gather(file.get, file, shapes(model), t5_rows(file, model))


def difference(got, want):
    """The largest on real tokens; features are of the order of 1."""
    return np.abs(np.asarray(got) - want)[MASK].max()


@pytest.fixture(scope="module")
def run():
    def run(model, params, ids=IDS, mask=MASK):
        return np.asarray(jax.jit(model.apply)({"params": params}, ids, mask))

    return run


@pytest.fixture(scope="module", params=KINDS)
def case(request, public_file):
    """(kind, keys and arrays of the file, our encoder, their features [b l d])."""
    config, encoder = (getattr(transformers, name) for name in KINDS[request.param])
    theirs = encoder(config(**TINY))
    file = public_file(theirs)
    with torch.no_grad():
        want = theirs(torch.from_numpy(IDS).long(), torch.from_numpy(MASK)).last_hidden_state
    return request.param, file, t5_from_config(theirs.config.to_dict()), want.numpy()


def test_features_are_transformers(case, run):
    kind, file, model, want = case
    assert model.shared_bias == (kind == "t5")
    params = read(file, model)
    got = run(model, params)
    assert got.dtype == np.float32 and difference(got, want) < 1e-5
    # A prompt alone and without padding.
    alone = run(model, params, IDS[1:2, :7], MASK[1:2, :7])
    np.testing.assert_allclose(alone[0], got[1, :7], atol=1e-5)


def test_bfloat16_is_near(case, run):
    _, file, model, want = case
    got = run(model.copy(dtype="bfloat16"), read(file, model))
    assert got.dtype == np.float32 and 1e-4 < difference(got, want) < 0.1


def test_what_would_be_wrong_is_seen(case, run, monkeypatch):
    kind, file, model, want = case
    params = read(file, model)
    assert difference(run(model.copy(eps=1e-5), params), want) > 1e-4
    if kind == "umt5":
        # T5's bias: that of the first layer in all of them.
        first = dict(params, distance={"table": params["layers"]["distance"]["table"][0]})
        assert difference(run(model.copy(shared_bias=True), first), want) > 1e-2
    layers = params["layers"]
    swapped = layers | {"gate_up": layers["up"], "up": layers["gate_up"]}
    assert difference(run(model, params | {"layers": swapped}), want) > 1e-2
    monkeypatch.setitem(t5.ACTIVATIONS, "gelu", t5.ACTIVATIONS["gelu_exact"])
    assert difference(run(model, params), want) > 2e-5
    monkeypatch.undo()
    attend = t5.attend
    monkeypatch.setattr(t5, "attend", lambda *args, scale, **kw: attend(*args, **kw))
    assert difference(run(model, params), want) > 1e-2


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 12)])
def test_buckets_are_transformers(buckets, farthest):
    config = transformers.UMT5Config(
        **TINY
        | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest}
    )
    theirs = transformers.UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    place = torch.arange(600)
    want = theirs._relative_position_bucket(place[None] - place[:, None]).numpy()
    np.testing.assert_array_equal(distance_buckets(600, buckets, farthest), want)


def test_sharded_over_eight_devices(randomise, run):
    model = T5Encoder(vocabulary=50, width=16, depth=2, heads=4, head_width=6, hidden=32)
    params = randomise(shapes(model))
    mesh = MeshSpec(data=1, fsdp=4, tensor=2).make()
    with jax.set_mesh(mesh):
        laid = jax.device_put(params, param_shardings(mesh, params))
        assert not laid["layers"]["gate_up"]["kernel"].sharding.is_fully_replicated
        ids, mask = (jax.device_put(x, batch_sharding(mesh)) for x in (IDS, MASK))
        got = run(model, laid, ids, mask)
    assert difference(got, run(model, params)) < 1e-5


def wan_keys(file):
    """A file of transformers as the original Wan names it."""
    parts = {
        "layer.0.layer_norm": "norm1",
        "layer.1.layer_norm": "norm2",
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
        "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1",
        "layer.1.DenseReluDense.wo": "ffn.fc2",
        "layer.0.SelfAttention.": "attn.",
        "encoder.block.": "blocks.",
        "encoder.final_layer_norm": "norm",
        "shared": "token_embedding",
    }
    out = {}
    for key, value in file.items():
        for theirs, wans in parts.items():
            key = key.replace(theirs, wans)
        out[key] = value
    return out


def test_every_name_of_the_same_weights(case):
    kind, file, model, _ = case
    want = read(file, model)
    words = file["shared.weight"]
    rest = {k: v for k, v in file.items() if k != "shared.weight"}
    files = [
        rest | {"encoder.embed_tokens.weight": words},
        file | {"encoder.embed_tokens.weight": words},
    ]
    if kind == "umt5":
        files.append(wan_keys(file))
        assert "blocks.2.pos_embedding.embedding.weight" in files[-1]
    for other in files:
        jax.tree.map(np.testing.assert_array_equal, read(other, model), want)
    for layout in (file, files[-1] if kind == "umt5" else file):
        back = dict(export(want, t5_rows(layout, model)))
        assert set(back) == set(layout)
        for key in back:
            np.testing.assert_array_equal(back[key], layout[key])


def test_a_bias_too_many_or_too_few(public_file):
    umt5, theirs = (
        getattr(transformers, e)(getattr(transformers, c)(**TINY)) for c, e in KINDS.values()
    )
    for source, kind in ((umt5, "t5"), (theirs, "umt5")):
        model = t5_from_config(source.config.to_dict() | {"model_type": kind})
        with pytest.raises(WeightsError, match=r"relative_attention_bias|layers \[1, 2\]"):
            read(public_file(source), model)


def test_sizes_are_those_of_the_pretrained_models():
    tiny = t5_from_config(TINY | {"model_type": "umt5"})
    assert (tiny.vocabulary, tiny.head_width, tiny.eps, tiny.buckets) == (50, 6, 1e-6, 8)
    for name, count in (("umt5-xxl", 5_680_910_336), ("t5-v1.1-xxl", 4_762_310_656)):
        leaves = jax.tree.leaves(shapes(T5Encoder(**SIZES[name])))
        assert sum(leaf.size for leaf in leaves) == count
    mesh = MeshSpec(data=1, fsdp=4, tensor=2).make()
    param_shardings(mesh, shapes(T5Encoder(**SIZES["umt5-xxl"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "unknown name 'bert'.*Known: umt5, t5"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'; only 'gated-gelu'"),
        ({"d_kv": None, "d_ff": None}, "lacks d_kv, d_ff"),
    ],
)
def test_configs_that_cannot_be_read(change, message):
    config = {k: v for k, v in (TINY | {"model_type": "t5"} | change).items() if v is not None}
    with pytest.raises(ConfigError, match=message):
        t5_from_config(config)
