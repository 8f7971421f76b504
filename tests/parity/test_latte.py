"""Latte against the network of diffusers, through the folder that diffusers saves."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdx.config.loader import resolve
from vdx.experiment import Experiment
from vdx.interop import latte
from vdx.interop.keymap import WeightsError, export
from vdx.interop.latte import is_latte, latte_denoiser, latte_rows, load_latte
from vdx.interop.save import export_plan
from vdx.models import transformer, transformer_blocks
from vdx.models.denoiser import Denoiser
from vdx.models.layers import layer_norm
from vdx.models.positions import plane_table, sincos_table
from vdx.models.shapes import new_shapes
from vdx.parallel import MeshSpec, put_batch

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

TINY = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=16,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=12,
    video_length=4,
)
B, T = 2, 4
MESH = {"fsdp": 2, "context": 2, "tensor": 2}


@dataclasses.dataclass
class Case:
    """A reference with its inputs and prediction, and our network from its folder."""

    folder: Path
    batch: dict
    x: np.ndarray
    time: np.ndarray
    reference: Any
    want: np.ndarray
    model: Denoiser
    params: Any

    @functools.cached_property
    def run(self):
        """Jitted (params, batch, x) -> prediction. Each Case compiles its own, so that a test can
        replace code."""
        return jax.jit(
            lambda p, batch, x: self.model.run(
                p, x, self.time, batch, self.model.drop_masks(B, False), method="train_view"
            )
        )

    @torch.no_grad()
    def reference_prediction(self, x, text, time, **options):
        x, text, time = (
            torch.from_numpy(np.ascontiguousarray(a)) for a in (np.moveaxis(x, -1, 1), text, time)
        )
        out = self.reference(x, time, text, **options).sample.numpy()
        return np.moveaxis(out, 1, -1)[..., :4]  # without the variance

    def error(self, params=None) -> float:
        got = self.run(self.params if params is None else params, self.batch, self.x)
        return float(np.abs(got - self.want).max())


def randomised(config):
    """The reference with random numbers in every parameter."""
    model = diffusers.LatteTransformer3DModel(**config).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=g)
                * (0.2 if p.ndim == 1 or "table" in name else np.prod(p.shape[1:]) ** -0.5)
            )
    return model


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("latte")
    reference = randomised(TINY)
    reference.save_pretrained(folder)
    x = rng.normal(size=(B, T, 8, 8, 4)).astype(np.float32)
    text = rng.normal(size=(B, 5, 12)).astype(np.float32)
    model = latte_denoiser(json.loads((folder / "config.json").read_text()))
    params = load_latte(folder, model, MeshSpec().make(jax.devices()[:1]))
    made = Case(
        folder,
        {"text": text, "text_mask": np.ones((B, 5), bool)},
        x,
        np.array([37.0, 803.0], np.float32),
        reference,
        np.zeros(0),
        model,
        params,
    )
    made.want = made.reference_prediction(x, text, made.time)
    return made


def test_the_prediction_is_theirs(case):
    assert case.want.std() > 0.5 and case.error() < 1e-4


@pytest.mark.slow
def test_on_other_frames_of_other_sizes(case):
    """A wide frame, whose positions span the same range as those of the training size."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(B, T, 12, 20, 4)).astype(np.float32)
    want = case.reference_prediction(x, case.batch["text"], case.time)
    np.testing.assert_allclose(case.run(case.params, case.batch, x), want, atol=1e-4)


@pytest.mark.slow
def test_an_image_is_theirs_without_temporal_attention(case):
    x = case.x[:, :1]
    want = case.reference_prediction(
        x, case.batch["text"], case.time, enable_temporal_attentions=False
    )
    np.testing.assert_allclose(case.run(case.params, case.batch, x), want, atol=1e-4)


@pytest.mark.slow
def test_padded_text_is_text_cut_off(case):
    """Their pipeline cuts the text of a prompt; ours masks it."""
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    got = case.run(case.params, case.batch | {"text_mask": mask}, case.x)
    for i in range(B):
        want = case.reference_prediction(
            case.x[i : i + 1], case.batch["text"][i : i + 1, mask[i]], case.time[i : i + 1]
        )
        np.testing.assert_allclose(got[i : i + 1], want, atol=1e-4)


def test_every_parameter_is_seen(case):
    """Changed one by one, each parameter changes the prediction. The bias of a key does not: it
    shifts all scores of a query by the same amount."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(jax.device_get(case.params))
    for i, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path)
        if "null" in name:
            assert not leaf.any()
            continue
        changed = [v for _, v in leaves]
        changed[i] = np.roll(leaf, 1, -1)
        error = case.error(jax.tree.unflatten(tree, changed))
        assert error < 1e-4 if "['k']['bias']" in name else error > 2e-4, name


def transposed_plane(grid, width, base):
    return plane_table(grid[::-1], width, base).swapaxes(0, 1)


FAULTS = {
    "rows and columns swapped": (transformer, "plane_table", transposed_plane),
    "cosines first": (transformer, "sincos_table", lambda *a: np.roll(sincos_table(*a), 8, -1)),
    "epsilon 1e-3": (transformer_blocks, "layer_norm", functools.partial(layer_norm, eps=1e-3)),
    "positions in time in every layer": (transformer.jnp, "zeros_like", lambda x: x),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "the variance's rows"])
def test_a_fault_is_seen(fault, case, monkeypatch):
    case = dataclasses.replace(case)
    if fault in FAULTS:
        monkeypatch.setattr(*FAULTS[fault])
    else:
        half = lambda x: x.reshape(4, 2, 4, *x.shape[1:])[:, 1].reshape(16, *x.shape[1:]).T
        monkeypatch.setattr(latte, "first_half", lambda pixels: latte.Layout(half, None))
        case.params = load_latte(case.folder, case.model, MeshSpec().make(jax.devices()[:1]))
    assert case.error() > 1e-3


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_run_begins_from_its_files(dtype, case):
    """`config.weights` is read as Latte, in the network's dtype if there are adapters."""
    config = resolve("configs/wan21_t2v_1p3b.py:smoke", [])
    config |= {
        "weights": str(case.folder),
        "model": {
            "backbone": {**case.model.backbone_config, "dtype": dtype},
            "signals": case.model.signals,
        },
    }
    if dtype == "bfloat16":
        config["lora"] = {"rank": 2}
    made = Experiment(config)
    params = made.weights.read_weights(MeshSpec().make(jax.devices()[:1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), params, case.params
    )
    assert str(params["network"]["layers"]["block_1"]["time"]["q"]["kernel"].dtype) == dtype
    assert len(made.kernels) == (0 if made.lora is None else 16)


@pytest.mark.slow
def test_on_eight_devices_it_is_that_of_one(case):
    mesh = MeshSpec(data=1, **MESH).make()
    params = load_latte(case.folder, case.model, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, case.batch)
        got = dataclasses.replace(case).run(params, batch, case.x)
    np.testing.assert_allclose(got, case.want, atol=1e-4)


@pytest.mark.slow
def test_in_bfloat16_it_is_close(case):
    half = Denoiser({**case.model.backbone_config, "dtype": "bfloat16"}, case.model.signals)
    got = dataclasses.replace(case, model=half).run(case.params, case.batch, case.x)
    assert np.linalg.norm(got - case.want) < 0.03 * np.linalg.norm(case.want)


def test_what_is_written_is_what_was_read(case):
    """Except for the variance, which is zero."""
    rows = latte_rows(case.model)
    there = {k: v.numpy() for k, v in case.reference.state_dict().items()}
    again = dict(export(case.params, rows))
    assert set(again) == set(there)
    for key, value in again.items():
        want = there[key]
        if key.startswith("proj_out"):
            want = want.copy().reshape(4, 2, -1)
            want[:, 1] = 0
            want = want.reshape(value.shape)
        np.testing.assert_array_equal(value, want)


def test_the_published_model_has_these_arrays():
    """maxin-cn/Latte-1: names and shapes of diffusers' own model, which holds no memory here."""
    config = TINY | dict(
        num_attention_heads=16,
        attention_head_dim=72,
        num_layers=28,
        cross_attention_dim=1152,
        sample_size=64,
        caption_channels=4096,
        video_length=16,
    )
    with torch.device("meta"):
        want = {
            k: tuple(v.shape)
            for k, v in diffusers.LatteTransformer3DModel(**config).state_dict().items()
        }
    assert sum(np.prod(s) for s in want.values()) / 1e9 == pytest.approx(1.06, rel=5e-3)
    model = latte_denoiser(config | {"_class_name": "LatteTransformer3DModel"})
    shapes = new_shapes(model)
    assert {k: s for k, (s, _) in export_plan(shapes, latte_rows(model)).items()} == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05, not 1e-06"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine = True, not False"),
        ({"attention_bias": False}, "attention_bias = False, not True"),
        ({"out_channels": 5}, "out_channels = 5, not in_channels = 4 or twice that"),
        ({"sample_size": 65}, "sample_size = 65 is no number of patches"),
        ({"cross_attention_dim": 8}, "cross_attention_dim = 8, not 16"),
        (
            {"caption_channels": None, "num_layers": None},
            r"num_layers: is missing\n  caption_channels: is missing",
        ),
    ],
)
def test_configs_that_are_another_network(changes, message):
    with pytest.raises(WeightsError, match=message):
        latte_denoiser(TINY | {"_class_name": "LatteTransformer3DModel"} | changes)


def test_the_makers_folder(case, tmp_path):
    """Another class, and the array that no forward pass reads."""
    config = json.loads((case.folder / "config.json").read_text())
    assert latte_denoiser(config | {"_class_name": "LatteT2V"}) == case.model
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "LatteT2V"}))
    (file,) = case.folder.glob("*.safetensors")
    arrays = load_file(file) | {"caption_projection.y_embedding": np.ones((5, 12), np.float32)}
    save_file(arrays, tmp_path / file.name)
    read = load_latte(tmp_path, case.model, MeshSpec().make(jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, read, case.params)


def test_weights_that_do_not_fit(case, tmp_path):
    mesh, file = MeshSpec().make(jax.devices()[:1]), "diffusion_pytorch_model.safetensors"
    assert is_latte(case.folder)
    other = Denoiser(
        {**case.model.backbone_config, "sincos": 8, "cross": "normed"}, case.model.signals
    )
    with pytest.raises(
        WeightsError,
        match=r"sincos = 8, but the weights have 4\n.*cross = "
        "normed, but the weights have plain",
    ):
        load_latte(case.folder, other, mesh)
    (tmp_path / file).symlink_to(case.folder / file)
    with pytest.raises(WeightsError, match=r"config\.json is not there"):
        load_latte(tmp_path, case.model, mesh)
