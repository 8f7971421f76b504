"""CLIP's two towers against transformers', their tables of keys, and their images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vdx.config.build import ConfigError
from vdx.interop.clip import (
    clip_rows,
    clip_text_from_config,
    clip_vision_config,
    clip_vision_from_config,
)
from vdx.interop.components import open_component
from vdx.interop.keymap import WeightsError, export, gather
from vdx.interop.load import open_weights
from vdx.models.encoders.clip import preprocess
from vdx.models.shapes import init_shapes
from vdx.parallel import MeshSpec, param_shardings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2)
TEXT = SIZES | dict(vocab_size=60, max_position_embeddings=12, eos_token_id=57)
VISION = SIZES | dict(image_size=12, patch_size=4)
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 57, (3, 12)).astype(np.int32)
IDS[0, 7:], IDS[1, 11], IDS[2, 3:] = 57, 57, 57  # padded with the end token
IDS[1, 4] = 58  # the largest id is not the end
PIXELS = RNG.normal(size=(2, 12, 12, 3)).astype(np.float32)
MASK = np.arange(12) < np.array([8, 12, 4])[:, None]


@functools.cache
def applied(model):
    return jax.jit(model.apply)


@pytest.fixture(scope="module")
def run():
    def run(model, file, *inputs):
        like = init_shapes(model, *inputs)
        params = gather(file.get, file, like, clip_rows(file, model))
        return applied(model)({"params": params}, *inputs)

    return run


def assert_near(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want.detach().numpy(), atol=atol, rtol=0)


@pytest.fixture(scope="module", params=["quick_gelu", pytest.param("gelu", marks=pytest.mark.slow)])
def text(request, public_file):
    """(their model, its file, ours)."""
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**TEXT, hidden_act=request.param)
    )
    return theirs, public_file(theirs), clip_text_from_config(theirs.config.to_dict())


@pytest.fixture(scope="module")
def vision(public_file):
    """(file, ours, their last hidden state, hidden_states[-2], pooled)."""
    theirs = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**VISION, hidden_act="gelu")
    )
    file = public_file(theirs)
    out = theirs(torch.from_numpy(np.moveaxis(PIXELS, -1, 1).copy()), output_hidden_states=True)
    assert len(out.hidden_states) == 4
    return (
        file,
        clip_vision_from_config(theirs.config.to_dict()),
        out.last_hidden_state,
        out.hidden_states[-2],
        out.pooler_output,
    )


def ask(theirs, ids, mask=None):
    mask = None if mask is None else torch.from_numpy(mask).long()
    return theirs(torch.from_numpy(ids).long(), mask, output_hidden_states=True)


def test_text_is_transformers(text, run):
    theirs, file, model = text
    want, got = ask(theirs, IDS), run(model, file, IDS)
    assert_near(got.last, want.last_hidden_state)
    assert_near(got.pooled, want.pooler_output)
    assert_near(got.penultimate, want.hidden_states[-2])
    short = run(model, file, IDS[:1, :8])  # a token sees only those before it
    np.testing.assert_allclose(short.last[0], got.last[0, :8], atol=1e-5)
    masked = run(model, file, IDS, MASK)
    want = ask(theirs, IDS, MASK).last_hidden_state
    assert_near(np.asarray(masked.last)[MASK], want[torch.from_numpy(MASK)])


def test_the_old_end_token_is_the_largest_id(text, run):
    theirs, file, model = text
    old = model.copy(eos=2)
    theirs.eos_token_id = 2
    try:
        want = ask(theirs, IDS).pooler_output
    finally:
        theirs.eos_token_id = 57
    assert_near(run(old, file, IDS).pooled, want)
    assert np.abs(run(model, file, IDS).pooled[1] - want[1].detach().numpy()).max() > 1e-2


def test_vision_is_transformers(vision, run):
    file, model, last, penultimate, pooled = vision
    got = run(model, file, PIXELS)
    assert_near(got.last, last)
    assert_near(got.penultimate, penultimate)
    assert_near(got.pooled, pooled)
    without = run(model.copy(use_last=False), file, PIXELS)
    assert without.last is None and without.pooled is None
    assert_near(without.penultimate, penultimate)
    assert np.abs(got.last - got.penultimate).max() > 0.1


def test_a_wrong_text_model_is_seen(text, run):
    theirs, file, model = text
    want = ask(theirs, IDS).last_hidden_state.detach().numpy()
    other = {"quick_gelu": "gelu_exact", "gelu_exact": "quick_gelu"}[model.activation]
    for change in ({"eps": 1e-6}, {"activation": other}):
        assert np.abs(run(model.copy(**change), file, IDS).last - want).max() > 1e-4, change


def test_a_wrong_vision_model_is_seen(vision, run):
    file, model, _, penultimate, _ = vision
    penultimate = penultimate.detach().numpy()
    for change in ({"eps": 1e-6}, {"activation": "gelu"}):
        got = run(model.copy(**change), file, PIXELS).penultimate
        assert np.abs(got - penultimate).max() > 3e-5, change
    one_less = {k: v for k, v in file.items() if ".layers.2." not in k}
    got = run(model.copy(depth=2, use_last=False), one_less, PIXELS).penultimate
    assert np.abs(got - penultimate).max() > 0.1


def test_bfloat16_is_near(vision, run):
    file, model = vision[:2]
    want, got = (run(m, file, PIXELS) for m in (model, model.copy(dtype="bfloat16")))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32 and 1e-4 < np.abs(a - b).max() < 0.1


def test_the_sizes_that_wan_uses():
    """ViT-H, whole and without what Wan does not read: parameters as in torch, laid on a mesh."""
    config = transformers.CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        theirs = transformers.CLIPVisionModel(config)
    last = [*theirs.encoder.layers[-1].parameters(), *theirs.post_layernorm.parameters()]
    for use_last, without in ((True, []), (False, last)):
        model = clip_vision_from_config(config.to_dict(), use_last=use_last)
        like = init_shapes(model, jnp.zeros((1, 224, 224, 3)))
        want = theirs.num_parameters() - sum(p.numel() for p in without)
        assert sum(leaf.size for leaf in jax.tree.leaves(like)) == want
        param_shardings(MeshSpec(data=1, fsdp=4, tensor=2).make(), like)


def test_files_of_both_towers_and_older_prefixes(text, vision, run):
    (_, text_file, text_model), (vision_file, vision_model, *_) = text, vision
    both = {f"text_model.{k}": v for k, v in text_file.items()}
    both |= {f"vision_model.{k}": v for k, v in vision_file.items()}
    both |= {
        "text_model.embeddings.position_ids": np.arange(12)[None],
        "vision_model.embeddings.position_ids": np.arange(10)[None],
        "logit_scale": np.ones(()),
        "text_projection.weight": np.zeros((4, 16)),
        "visual_projection.weight": np.zeros((4, 16)),
    }
    for model, file, inputs in ((text_model, text_file, IDS), (vision_model, vision_file, PIXELS)):
        like = init_shapes(model, inputs)
        alone, of_both = (gather(f.get, f, like, clip_rows(f, model)) for f in (file, both))
        jax.tree.map(np.testing.assert_array_equal, alone, of_both)
        back = dict(export(alone, clip_rows(file, model)))
        assert set(back) == set(file)
        for key in file:
            np.testing.assert_array_equal(back[key], file[key])


WAN_CLIP = VISION | dict(hidden_size=160, hidden_act="gelu")  # two heads, as wide as Wan's


def wan_clip(file, order="qkv"):
    """A file of transformers' vision model as the original Wan's CLIP, with its other arrays."""
    names = {
        "pre_layrnorm": "pre_norm",
        "post_layernorm": "post_norm",
        "layer_norm": "norm",
        "encoder.layers": "transformer",
        "self_attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
        "self_attn.q_proj": "attn.to_qkv",
        "embeddings.patch_embedding": "patch_embedding",
    }
    width = file["embeddings.class_embedding"].size
    out = {
        "visual.cls_embedding": file["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": file["embeddings.position_embedding.weight"][None],
        "visual.head": np.zeros((width, 12), np.float32),
        "log_scale": np.zeros((), np.float32),
        "textual.token_embedding.weight": np.zeros((9, 4), np.float32),
    }
    for key, value in file.items():
        if any(part in key for part in ("class_emb", "position", "k_proj", "v_proj")):
            continue
        if ".q_proj." in key:
            value = np.concatenate([file[key.replace(".q_", f".{part}_")] for part in order])
        for old, new in names.items():
            key = key.replace(old, new)
        out[f"visual.{key}"] = value
    return out


def save_pth(arrays, path):
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}, path)
    return path


@pytest.fixture(scope="module")
def wan_vision(public_file):
    """(file of transformers, what it answers: hidden_states[-2])."""
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**WAN_CLIP))
    file = public_file(theirs)
    out = theirs(torch.from_numpy(np.moveaxis(PIXELS, -1, 1).copy()), output_hidden_states=True)
    return file, out.hidden_states[-2]


def see(path):
    """The features that Wan reads, of the vision model in a file."""
    part = open_component("image_encoder", path, "float32", clip_vision_config(open_weights(path)))
    params = part.load(MeshSpec().make(jax.devices()[:1]))
    return applied(part.module)({"params": params}, PIXELS).penultimate


def test_the_original_wans_file_is_that_of_transformers(wan_vision, tmp_path):
    file, want = wan_vision
    path = save_pth(wan_clip(file), tmp_path / "models_clip.pth")
    config = clip_vision_config(open_weights(path))
    theirs = transformers.CLIPVisionConfig(**WAN_CLIP).to_dict()
    assert config.pop("architectures") and {k: theirs[k] for k in config} == config
    assert_near(see(path), want)
    save_file(wan_clip(file), tmp_path / "clip.safetensors")
    np.testing.assert_array_equal(see(tmp_path / "clip.safetensors"), see(path))
    for order in ("kqv", "vkq", "qvk"):
        wrong = see(save_pth(wan_clip(file, order), tmp_path / "wrong.pth"))
        assert np.abs(wrong - want.detach().numpy()).max() > 1e-2


def test_a_file_that_is_not_the_original_wans_clip(wan_vision, tmp_path):
    file = wan_clip(wan_vision[0])

    def message(changes, lost=()):
        kept = {k: v for k, v in (file | changes).items() if k not in lost}
        with pytest.raises(WeightsError) as error:
            see(save_pth(kept, tmp_path / "x.pth"))
        return str(error.value)

    assert "not the weights of CLIP's vision model. They begin with a and lack" in message(
        {"a": np.zeros(2)}, file
    )
    layer = "visual.transformer.1."
    said = message(
        {
            f"{layer}attn.to_qkv.weight": np.zeros((481, 160), np.float32),
            "visual.cls_embedding": np.zeros((1, 1, 150), np.float32),
            "other": np.zeros(1),
        },
        {f"{layer}mlp.2.bias"},
    )
    for part in (
        "layers.1.attn.to_qkv.weight: no such parameter",
        "other: no such parameter",
        "attention/q/kernel: layers [1] are not in the file",
        "mlp/down/bias: layers [1]",
    ):
        assert part in said, said
    said = message(
        {
            "visual.cls_embedding": np.zeros((1, 1, 150), np.float32),
            f"{layer}attn.to_qkv.bias": np.zeros(483, np.float32),
        }
    )
    assert "class_embedding: is (150,) for class_table (160,)" in said
    assert "q_proj.bias: is (161,) for encoder/layers/attention/q/bias (160,)" in said
    narrow = {"visual.patch_embedding.weight": np.zeros((150, 3, 4, 4), np.float32)}
    assert "150 wide, which is no number of heads of 80" in message(narrow)


@pytest.mark.parametrize("shape", [(30, 41, 3), (64, 24, 3), (11, 9, 3), (17, 17, 3)])
def test_preprocessed_images_are_transformers(shape):
    frame = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    processor = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    want = processor.CLIPImageProcessorPil(
        size={"shortest_edge": 17}, crop_size={"height": 17, "width": 17}
    )(images=[frame, frame[::-1]], return_tensors="np")["pixel_values"]
    got = preprocess([frame, frame[::-1]], 17)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.moveaxis(want, 1, -1), atol=1e-6)


def test_errors(text, vision):
    model, key = text[2], jax.random.key(0)
    with pytest.raises(ValueError, match="13 tokens, but this CLIP reads 12"):
        jax.eval_shape(model.init, key, jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match=r"this CLIP reads \[b 12 12 3\]"):
        jax.eval_shape(vision[1].init, key, jnp.zeros((1, 12, 8, 3)))
    with pytest.raises(ValueError, match="uint8"):
        preprocess([np.zeros((8, 8, 3), np.float32)])


def test_configs():
    nested = {"model_type": "clip", "text_config": TEXT, "vision_config": SIZES}
    model = clip_text_from_config(nested)
    assert (model.width, model.activation, model.eps, model.eos) == (16, "quick_gelu", 1e-5, 57)
    model = clip_vision_from_config(nested)
    assert (model.image, model.patch, model.use_last) == (224, 32, True)
    for change, message in (
        ({"model_type": "clip_text_model"}, "of a 'clip_text_model', not"),
        ({"hidden_act": "relu"}, "hidden_act: unknown name 'relu'"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"patch_size": 5}, "whole number of square patches"),
    ):
        with pytest.raises(ConfigError, match=message):
            clip_vision_from_config(VISION | change)
    with pytest.raises(ConfigError, match="CLIP text model lacks hidden_size, num_hidden_layers"):
        clip_text_from_config({})
