"""Wan against the networks of diffusers, through the files that diffusers saves."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.interop.keymap import WeightsError, export
from vdx.interop.load import abstract_params, load_params
from vdx.interop.safetensors import write
from vdx.interop.save import export_plan, save_folder
from vdx.interop.stored_array import StoredArray
from vdx.interop.wan import load_wan, open_wan
from vdx.interop.wan_config import SKYREELS, wan_config, wan_from_config
from vdx.interop.wan_keys import IN_BLOCKS, OUTSIDE, wan_transformer_rows
from vdx.models import transformer, transformer_blocks
from vdx.models.denoiser import Denoiser
from vdx.models.layers import RMSNorm, layer_norm
from vdx.models.mixers import grid_attention
from vdx.models.positions import Rope, rope_table
from vdx.models.shapes import new_shapes
from vdx.parallel import MeshSpec, put_batch

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_utils  # noqa: E402

TINY = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=256,
    ffn_dim=64,
    num_layers=2,
    cross_attn_norm=True,
    rope_max_seq_len=1024,
)
IMAGE = dict(in_channels=12, image_dim=20, added_kv_proj_dim=48)
# Tiny configs. Wan 2.2 TI2V is the network of `t2v` with a time for each frame.
KINDS: dict[str, dict[str, Any]] = {
    "t2v": TINY,
    "ti2v": TINY,
    "i2v": TINY | IMAGE,
    "flf2v": TINY | IMAGE | {"pos_embed_seq_len": 14},
    "skyreels": TINY | {"num_frame_per_block": 2, "inject_sample_info": False},
    "skyreels_rate": TINY | {"num_frame_per_block": 1, "inject_sample_info": True},
    "vace": TINY | dict(num_layers=4, vace_layers=[0, 2], vace_in_channels=12),
}
# Of the rest, what each adds is in one of these.
QUICK = ("t2v", "flf2v", "skyreels_rate", "vace")


def each(kinds):
    """The kinds as cases, those that are not quick as slow ones."""
    return [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in kinds]


B, T, H, W = 2, 4, 4, 6
WEAK = 0.7  # of the control


def config_class(config):
    name = (
        "WanVACETransformer3DModel"
        if "vace_layers" in config
        else SKYREELS
        if "inject_sample_info" in config
        else "WanTransformer3DModel"
    )
    return getattr(diffusers, name)


def theirs_of(x: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


@dataclasses.dataclass
class Case:
    """A reference in a folder with its inputs and prediction, and our network from there."""

    folder: Path
    batch: dict
    x: np.ndarray
    time: np.ndarray
    predict: Any  # reference -> its prediction
    want: np.ndarray  # the prediction of `reference`
    reference: Any
    model: Denoiser
    params: Any

    @functools.cached_property
    def run(self):
        """Jitted params -> prediction. Each Case compiles its own, so that a test can replace
        code."""
        keep = self.model.drop_masks(B, False)
        if "control" in self.batch:
            call = lambda p, batch: self.model.run(
                p,
                self.x,
                self.time,
                self.model.run(p, batch, keep, method="condition").replace(
                    control_scale=jnp.full(B, WEAK)
                ),
            )
        else:
            call = lambda p, batch: self.model.run(
                p, self.x, self.time, batch, keep, method="train_view"
            )
        return jax.jit(call)

    def error(self, params=None) -> float:
        got = self.run(self.params if params is None else params, self.batch)
        return float(np.abs(got - self.want).max())


def abstract(model: Denoiser, mesh=None, dtype="float32"):
    shapes = new_shapes(model)
    return abstract_params(shapes, mesh or MeshSpec().make(jax.devices()[:1]), dtype)


def load(folder):
    wan = open_wan(folder)
    model = Denoiser(wan.backbone, wan.signals)
    return model, load_params(wan.source, abstract(model), wan_transformer_rows(model))


def randomised(config):
    """The reference with random numbers in every parameter. Kernels of patches are small: the
    first norms then have inputs of little variance, and their epsilon matters. The same holds for
    the two norms of the image's features."""
    model, g = config_class(config)(**config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
                continue
            p.copy_(noise * (0.2 if p.ndim == 1 else np.prod(p.shape[1:]) ** -0.5))
            if name.startswith("patch_embedding") or "image_embedder.ff.net.2" in name:
                p.mul_(0.01)
    return model


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """kind -> Case, each made once."""

    @functools.cache
    def make(kind: str) -> Case:
        config, rng = KINDS[kind], np.random.default_rng(1)
        x = rng.normal(size=(B, T, H, W, 4)).astype(np.float32)
        text = rng.normal(size=(B, 5, 16)).astype(np.float32)
        mask = np.array([[1, 1, 1, 0, 0], [1] * 5], bool)
        padded = np.zeros((B, 512, 16), np.float32)
        padded[:, :5] = text * mask[..., None]
        batch, noisy, given = {"text": text, "text_mask": mask}, x, {}
        time = np.array([37.3, 803.0], np.float32)
        their_time = torch.from_numpy(time)
        if kind == "ti2v":
            time = time[:, None] * np.array([0, 1, 1, 1], np.float32)
            their_time = torch.from_numpy(np.repeat(time, H * W // 4, 1))
        if "skyreels" in kind:
            time = rng.uniform(0, 999, size=(B, T)).astype(np.float32)
            their_time = torch.from_numpy(time)
            given = {"enable_diffusion_forcing": True}
        if config.get("inject_sample_info"):
            batch["fps"] = np.array([16, 24], np.float32)
        if "image_dim" in config:
            batch["concat"] = rng.normal(size=(B, T, H, W, 8)).astype(np.float32)
            noisy = np.concatenate([x, batch["concat"]], -1)
            images = 2 if "pos_embed_seq_len" in config else 1
            tokens = 0.01 * rng.normal(size=(B * images, 7, 20)).astype(np.float32)
            given["encoder_hidden_states_image"] = torch.from_numpy(tokens)
            batch["image_tokens"] = tokens.reshape(B, -1, 20)
        if "vace_layers" in config:
            batch["control"] = rng.normal(size=(B, T, H, W, 12)).astype(np.float32)
            given |= {
                "control_hidden_states": theirs_of(batch["control"]),
                "control_hidden_states_scale": torch.full((2,), WEAK),
            }
        reference = randomised(config)

        @torch.no_grad()
        def predict(reference):
            inputs = theirs_of(noisy), their_time, torch.from_numpy(padded)
            if "fps" in batch:  # clip by clip: it cannot add one rate to each of several clips
                out = torch.cat(
                    [
                        reference(
                            *(a[i : i + 1] for a in inputs),
                            **given,
                            fps=[int(batch["fps"][i] != 16)],
                        ).sample
                        for i in range(B)
                    ]
                )
            else:
                out = reference(*inputs, **given).sample
            return np.moveaxis(out.numpy(), 1, -1)

        folder = tmp_path_factory.mktemp(kind)
        reference.save_pretrained(folder)
        return Case(folder, batch, x, time, predict, predict(reference), reference, *load(folder))

    return make


@pytest.mark.parametrize("kind", each(KINDS))
def test_the_prediction_is_theirs(kind, cases):
    case = cases(kind)
    assert case.want.std() > 0.5
    assert case.error() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, None])
def test_other_blocks_of_skyreels_are_seen(block, cases):
    case = cases("skyreels")
    backbone = {**case.model.backbone_config, "pattern": ({"name": "full", "block": block},)}
    other = Denoiser(backbone, case.model.signals)
    assert dataclasses.replace(case, model=other).error() > 1e-3


def test_blocks_and_rates_of_skyreels_are_seen(cases):
    """Other rates and other blocks change the prediction. Set to blocks, their network predicts the
    same as ours with blocks, from weights that do not depend on blocks."""
    case = cases("skyreels_rate")
    swapped = {**case.batch, "fps": np.array([24, 16], np.float32)}
    assert np.abs(case.run(case.params, swapped) - case.want).max() > 1e-3
    case.reference._set_ar_attention(2)
    blocks = Denoiser(
        {**case.model.backbone_config, "pattern": ({"name": "full", "block": 2},)},
        case.model.signals,
    )
    params = load_wan(case.folder, blocks, MeshSpec().make(jax.devices()[:1]))
    got = dataclasses.replace(case, model=blocks, want=case.predict(case.reference))
    case.reference._set_ar_attention(1)
    assert got.error(params) < 1e-4 and np.abs(got.want - case.want).max() > 1e-3


@pytest.mark.parametrize("kind", each(["i2v", "flf2v"]))
def test_the_embeddings_of_the_conditions_are_theirs(kind, cases):
    case = cases(kind)
    ports = jax.jit(
        lambda p: case.model.run(p, case.batch, case.model.drop_masks(B, False), method="condition")
    )(case.params)
    embedder = case.reference.condition_embedder
    padded = np.zeros((B, 512, 16), np.float32)
    padded[:, :5] = case.batch["text"] * case.batch["text_mask"][..., None]
    with torch.no_grad():
        want = embedder.text_embedder(torch.from_numpy(padded)).numpy()
        np.testing.assert_allclose(ports.tokens, want, atol=1e-5)
        images = torch.from_numpy(case.batch["image_tokens"]).reshape(-1, 7, 20)
        want = embedder.image_embedder(images).numpy()
        np.testing.assert_allclose(ports.image_tokens, want.reshape(B, -1, 48), atol=1e-5)


def swapped_axes(grid, width, theta=1e4):
    t, h, w = grid
    return Rope(*(x.transpose(0, 2, 1, 3, 4) for x in rope_table((t, w, h), width, theta)))


class PerHead(RMSNorm):
    """Norm after the split into heads, as other models have it."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.reshape(*x.shape[:-1], TINY["num_attention_heads"], -1)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        return y.reshape(x.shape) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


FAULTS = {
    "rope axes swapped": (transformer, "rope_table", swapped_axes),
    "epsilon 1e-5": (transformer_blocks, "layer_norm", functools.partial(layer_norm, eps=1e-5)),
    "norm after the split": (grid_attention, "RMSNorm", PerHead),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_network_is_seen(fault, cases, monkeypatch):
    case = dataclasses.replace(cases("t2v"))
    monkeypatch.setattr(*FAULTS[fault])
    assert case.error() > 1e-3


@pytest.mark.slow
def test_every_parameter_is_seen(cases):
    """Changed one by one, each parameter changes the prediction: every one is used, and no bias is
    missing. The bias of a key would shift all scores by the same amount, but a norm follows it."""
    for kind in ("flf2v", "vace", "skyreels_rate"):
        case = cases(kind)
        leaves, tree = jax.tree_util.tree_flatten_with_path(jax.device_get(case.params))
        for i, (path, leaf) in enumerate(leaves):
            name = jax.tree_util.keystr(path)
            if "null" in name:
                assert not leaf.any()
                continue
            changed = [v for _, v in leaves]
            changed[i] = np.roll(leaf, 1, -1)
            assert case.error(jax.tree.unflatten(tree, changed)) > 2e-4, name


def test_text_is_padded_with_zeros_that_are_seen(cases):
    case = cases("t2v")
    masked = Denoiser(case.model.backbone_config, {"embeddings": {"features": 16}})
    assert dataclasses.replace(case, model=masked).error() > 1e-3


def test_in_bfloat16_it_is_close(cases):
    case = cases("flf2v")
    half = Denoiser({**case.model.backbone_config, "dtype": "bfloat16"}, case.model.signals)
    wan = open_wan(case.folder)
    params = load_params(wan.source, abstract(half, dtype="bfloat16"), wan_transformer_rows(half))
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    assert types == {"bfloat16", "float32"}
    got = dataclasses.replace(case, model=half).run(params, case.batch)
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - case.want) < 0.03 * np.linalg.norm(case.want)


@pytest.mark.parametrize("kind", each(["i2v", "vace"]))
def test_on_eight_devices_it_is_that_of_one(kind, cases):
    case, wan = cases(kind), open_wan(cases(kind).folder)
    mesh = MeshSpec(data=1, fsdp=2, context=2, tensor=2).make()
    params = load_params(wan.source, abstract(case.model, mesh), wan_transformer_rows(case.model))
    kernel = params["network"]["layers"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.size // kernel.addressable_shards[0].data.size == 4
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    with jax.set_mesh(mesh):
        batch = put_batch(mesh, case.batch)
        got = dataclasses.replace(case).run(params, batch)
    np.testing.assert_allclose(got, case.run(case.params, case.batch), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("vace", 99_000),
        ("flf2v", 99_000),
        ("skyreels_rate", 10**9),
        pytest.param("t2v", 10**9, marks=pytest.mark.slow),
    ],
)
def test_diffusers_reads_what_is_written(kind, most, cases, tmp_path, monkeypatch):
    case = cases(kind)
    # With this list it wants `accelerate`, to read in another type than that of the file.
    monkeypatch.setattr(config_class(KINDS[kind]), "_keep_in_fp32_modules", None)
    rows = wan_transformer_rows(case.model)
    shapes = {key: shape for key, (shape, _) in export_plan(case.params, rows).items()}
    save_folder(case.params, rows, wan_config(shapes, head_width=24), tmp_path / "out", most)
    sizes = [p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == 1 if most > 99_000 else len(sizes) > 3 and max(sizes) < 1.1 * most
    again = config_class(KINDS[kind]).from_pretrained(tmp_path / "out")
    want = case.reference.state_dict()
    assert again.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[key]) for key, value in again.state_dict().items())
    assert {k: again.config[k] for k in KINDS[kind]} == KINDS[kind]
    # Copied out of the file's memory map: at unaligned addresses sums have another order.
    again.load_state_dict({k: v.clone() for k, v in again.state_dict().items()}, assign=True)
    np.testing.assert_array_equal(case.predict(again.eval()), case.want)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], case.params)


def original_names(keys):
    """key of diffusers -> key of the original, from the table read backwards."""

    def one(key):
        in_block = key.startswith(("blocks.", "vace_blocks."))
        head = ".".join(key.split(".")[:2]) + "." if in_block else ""
        layer = key.removeprefix(head).removesuffix(".weight").removesuffix(".bias")
        old = {new: old for old, new in (IN_BLOCKS if in_block else OUTSIDE).items()}[layer]
        return head + old + key.removeprefix(head + layer)

    return {key: one(key) for key in keys}


@pytest.mark.parametrize("kind", ["flf2v", "vace"])
def test_original_files_hold_the_same(kind, cases, tmp_path, monkeypatch):
    case = cases(kind)
    arrays = {k: v.numpy() for k, v in case.reference.state_dict().items()}
    names = original_names(arrays)
    # Their own renaming agrees; it has no positions of images.
    there = single_file_utils.convert_wan_transformer_to_diffusers(
        {old: torch.from_numpy(arrays[new]) for new, old in names.items() if "emb_pos" not in old}
    )
    assert set(there) == {key for key in arrays if "pos_embed" not in key}
    assert all(np.array_equal(value, arrays[key]) for key, value in there.items())

    # One file of ComfyUI, without a config that gives the width of a head.
    monkeypatch.setattr("vdx.interop.wan.HEAD_WIDTH", 24)
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        save = {prefix + old: arrays[new] for new, old in names.items()}
        write(
            tmp_path / "model.safetensors",
            {k: (v.shape, v.dtype) for k, v in save.items()},
            save.items(),
        )
        model, params = load(tmp_path / "model.safetensors")
        assert (
            model.backbone_config == case.model.backbone_config
            and model.signals == case.model.signals
        )
        jax.tree.map(np.testing.assert_array_equal, params, case.params)


@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module."])
def test_files_of_self_forcing_hold_averaged_weights(prefix, cases, tmp_path, monkeypatch):
    """`{"generator_ema": ..., "generator": ..., "critic": ...}`, each the state of a module whose
    `model` is the original Wan's."""
    case = cases("t2v")
    arrays = case.reference.state_dict()
    saved = {prefix + old: arrays[new] for new, old in original_names(arrays).items()}
    other = {key: value + 1 for key, value in saved.items()}
    monkeypatch.setattr("vdx.interop.wan.HEAD_WIDTH", 24)
    for parts in (
        {"generator_ema": saved, "generator": other, "critic": other},
        {"generator": saved, "critic": other},
    ):
        torch.save(parts, tmp_path / "model.pt")
        model, params = load(tmp_path / "model.pt")
        assert (
            model.backbone_config == case.model.backbone_config
            and model.signals == case.model.signals
        )
        jax.tree.map(np.testing.assert_array_equal, params, case.params)


# The published models: billions of parameters, and the fields that differ from the first.
T2V = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=12,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=8960,
    num_layers=30,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    eps=1e-6,
    image_dim=None,
    added_kv_proj_dim=None,
    rope_max_seq_len=1024,
    pos_embed_seq_len=None,
)
BIG = T2V | dict(num_attention_heads=40, num_layers=40, ffn_dim=13824)
I2V = BIG | dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)
PUBLISHED = {
    "T2V 1.3B": (1.42, T2V),
    "T2V 14B": (14.3, BIG),
    "I2V 14B": (16.4, I2V),
    "FLF2V 14B": (16.4, I2V | dict(pos_embed_seq_len=514)),
    "I2V A14B": (14.3, BIG | dict(in_channels=36)),
    "TI2V 5B": (
        5.0,
        T2V | dict(num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336),
    ),
    "SkyReels DF 1.3B": (1.43, T2V | dict(inject_sample_info=True)),
    "VACE 1.3B": (2.15, T2V | dict(vace_layers=list(range(0, 30, 2)), vace_in_channels=96)),
    "VACE 14B": (17.3, BIG | dict(vace_layers=list(range(0, 40, 5)), vace_in_channels=96)),
}


# One of each kind of network; the others differ from these in numbers alone.
KINDS_OF_NETWORK = ("T2V 1.3B", "FLF2V 14B", "SkyReels DF 1.3B", "VACE 1.3B")


@pytest.mark.parametrize(
    "name",
    [n if n in KINDS_OF_NETWORK else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED],
)
def test_published_models_have_these_arrays(name):
    """Names and shapes of diffusers' own models, which hold no memory here."""
    billions, config = PUBLISHED[name]
    with torch.device("meta"):
        want = {k: tuple(v.shape) for k, v in config_class(config)(**config).state_dict().items()}
    assert sum(np.prod(s) for s in want.values()) / 1e9 == pytest.approx(billions, rel=5e-3)
    model = Denoiser(*wan_from_config(config))
    shapes = new_shapes(model)
    rows = wan_transformer_rows(model)
    assert {k: shape for k, (shape, _) in export_plan(shapes, rows).items()} == want
    found = wan_config(want, 128)
    assert {k: v for k, v in found.items() if k != "_class_name"} == config
    assert found["_class_name"] == config_class(config).__name__


def test_presets_are_the_published_sizes():
    for size, name in {"wan_1p3b": "T2V 1.3B", "wan_14b": "T2V 14B", "wan_5b": "TI2V 5B"}.items():
        net = transformer.Transformer(size=size)
        config = PUBLISHED[name][1]
        assert net.dims()[:3] == (
            config["num_attention_heads"] * 128,
            config["num_layers"],
            config["num_attention_heads"],
        )
        assert net.hidden() == config["ffn_dim"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 1e-5}, r"eps = 1e-05, not 1e-06"),
        ({"cross_attn_norm": False}, "cross_attn_norm = False, not True"),
        ({"_class_name": "WanAnimateTransformer3DModel"}, "not 'WanTransformer3DModel'"),
        ({"vace_layers": [0, 1, 8], "vace_in_channels": 96}, "not evenly spaced from 0 over 30"),
        ({"num_layers": None, "ffn_dim": None}, r"ffn_dim: is missing\n  num_layers: is missing"),
        ({"in_channels": 4}, "in_channels is less than out_channels"),
    ],
)
def test_configs_that_are_another_network(changes, message):
    with pytest.raises(WeightsError, match=message):
        wan_from_config(T2V | changes)


def test_a_config_that_disagrees_with_the_weights(cases, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(
        cases("flf2v").folder / "diffusion_pytorch_model.safetensors"
    )
    text = (cases("flf2v").folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace('"ffn_dim": 64', '"ffn_dim": 65').replace(
            '"image_dim": 20', '"image_dim": null'
        )
    )
    with pytest.raises(
        WeightsError,
        match=r"\n  ffn_dim = 65, but the weights have 64"
        r"\n  image_dim = None, but the weights have 20",
    ):
        open_wan(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"48 wide, which is no number of heads of 128"):
        open_wan(tmp_path / "model.safetensors")


def test_weights_of_something_else(tmp_path):
    write(
        tmp_path / "vae.safetensors",
        {"encoder.conv_in.weight": ((2,), np.dtype("f4"))},
        [("encoder.conv_in.weight", np.zeros(2, np.float32))],
    )
    with pytest.raises(WeightsError, match=r"not .* a Wan transformer\. They begin with encoder"):
        open_wan(tmp_path)


def test_an_array_of_older_files_is_not_read(cases):
    case = cases("flf2v")
    wan, rows = open_wan(case.folder), wan_transformer_rows(case.model)
    extra = StoredArray(case.folder / "nowhere", np.dtype("f4"), (48,), 0)
    source = wan.source | {"blocks.1.attn2.norm_added_q.weight": extra}
    jax.tree.map(
        np.testing.assert_array_equal, load_params(source, abstract(case.model), rows), case.params
    )
    assert not any("norm_added_q" in key for key, _ in export(case.params, rows))
