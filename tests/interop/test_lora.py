"""LoRA files of every layout against what they mean: the weights W + scale B A, in the names and
the order of diffusers, loaded as weights are."""

import json
import re
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vdx.config.build import ConfigError
from vdx.interop import wan_keys
from vdx.interop.keymap import LINEAR, WeightsError, export, gather
from vdx.interop.lora import open_lora, write_lora
from vdx.interop.wan_config import wan_config, wan_from_config
from vdx.interop.wan_keys import original_name, wan_transformer_rows
from vdx.models.adapters.lora import WeightDelta, adapt
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes

TINY: dict[str, Any] = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=2,
    attention_head_dim=24,
    in_channels=12,
    out_channels=4,
    text_dim=16,
    freq_dim=256,
    ffn_dim=64,
    num_layers=2,
    cross_attn_norm=True,
    rope_max_seq_len=1024,
    image_dim=20,
    added_kv_proj_dim=48,
)
RNG = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1] if shape else 1)).astype(dtype)


class Tiny:
    """A model, its weights as diffusers has them, and factors for its layers."""

    def __init__(self, config, randomise):
        self.model = Denoiser(*wan_from_config(config))
        self.rows = wan_transformer_rows(self.model)
        self.shapes = new_shapes(self.model)
        self.params = randomise(self.shapes)
        self.params["conditioning"]["embeddings"]["null"][:] = 0
        self.weights = dict(export(self.params, self.rows))
        self.layers = [
            key.removesuffix(".weight")
            for key, w in self.weights.items()
            if w.ndim > 1 and key.endswith(".weight")
        ]

    def loaded(self, weights):
        return gather(weights.__getitem__, weights, self.shapes, self.rows)

    def factors(self, layers, rank=3):
        """{layer: (A [r in ...], B [out r ...])}; ranks differ from layer to layer."""
        out = {}
        for i, layer in enumerate(layers):
            w, r = self.weights[f"{layer}.weight"], rank + i % 2
            out[layer] = (normal(r, *w.shape[1:]), normal(w.shape[0], r, *[1] * (w.ndim - 2)))
        return out

    def changed(self, factors, scale=1.0, diffs=None):
        """Parameters of weights W + scale B A + differences; scale: a number, or of each layer."""
        new = dict(self.weights)
        for layer, (a, b) in factors.items():
            s = scale[layer] if isinstance(scale, dict) else scale
            product = b.reshape(b.shape[:2]) @ a.reshape(len(a), -1)
            key = f"{layer}.weight"
            new[key] = new[key] + s * product.reshape(new[key].shape)
        for key, value in (diffs or {}).items():
            new[key] = new[key] + value
        return self.loaded(new)


@pytest.fixture(scope="module")
def tiny(randomise):
    return Tiny(TINY, randomise)


def merged(tiny, path, **options):
    return adapt(tiny.params, open_lora(path, tiny.model, **options), merge=True)


def same(got, want, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), got, want)


def differs(got, want):
    with pytest.raises(AssertionError):
        same(got, want, 1e-3)


def in_blocks(tiny):
    return [layer for layer in tiny.layers if layer.startswith("blocks.")]


# The four layouts, written by hand.


def as_diffusers(factors, part="transformer"):
    return {
        f"{part}.{layer}.lora_{half}.weight": value
        for layer, pair in factors.items()
        for half, value in zip("AB", pair, strict=True)
    }


def as_comfyui(factors, prefix="diffusion_model.", names=("lora_down", "lora_up"), alpha=None):
    out = {
        f"{prefix}{original_name(layer)}.{name}.weight": value
        for layer, pair in factors.items()
        for name, value in zip(names, pair, strict=True)
    }
    if alpha is not None:
        out |= {
            f"{prefix}{original_name(layer)}.alpha": np.array(alpha, np.float32)
            for layer in factors
        }
    return out


def as_kohya(factors, alpha):
    out = {}
    for layer, (a, b) in factors.items():
        name = "lora_unet_" + original_name(layer).replace(".", "_")
        out |= {
            f"{name}.lora_down.weight": a,
            f"{name}.lora_up.weight": b,
            f"{name}.alpha": np.array(alpha, np.float32),
        }
    return out


def scales(factors, alpha):
    return {layer: alpha / len(a) for layer, (a, _) in factors.items()}


def test_diffusers(tiny, tmp_path):
    factors = tiny.factors(tiny.layers)  # every matrix there is, the patches' too
    save_file(as_diffusers(factors), tmp_path / "pytorch_lora_weights.safetensors")
    same(merged(tiny, tmp_path), tiny.changed(factors))
    save_file(
        {k: v.astype(ml_dtypes.bfloat16) for k, v in as_diffusers(factors).items()},
        tmp_path / "half.safetensors",
    )
    half = {
        k: tuple(v.astype(ml_dtypes.bfloat16).astype(np.float32) for v in pair)
        for k, pair in factors.items()
    }
    same(merged(tiny, tmp_path / "half.safetensors"), tiny.changed(half))


def test_diffusers_with_metadata(tiny, tmp_path):
    factors, path = tiny.factors(in_blocks(tiny)), tmp_path / "lora.safetensors"
    noted = {
        "transformer.r": 3,
        "transformer.lora_alpha": 6,
        "transformer.use_rslora": True,
        "transformer.alpha_pattern": {"attn1.to_q": 5, r"blocks\.1\.ffn\.net\.2": 7},
        "transformer_2.lora_alpha": 1000,
    }
    save_file(as_diffusers(factors), path, {"lora_adapter_metadata": json.dumps(noted)})
    alpha = dict.fromkeys(factors, 6) | {"blocks.1.ffn.net.2": 7}
    alpha |= {f"blocks.{i}.attn1.to_q": 5 for i in range(2)}
    want = {layer: alpha[layer] / np.sqrt(len(a)) for layer, (a, _) in factors.items()}
    same(merged(tiny, path), tiny.changed(factors, want))


def test_diffusers_with_both_experts(tiny, tmp_path):
    high, low = tiny.factors(in_blocks(tiny)), tiny.factors(in_blocks(tiny)[:5])
    path = tmp_path / "both.safetensors"
    save_file(as_diffusers(high) | as_diffusers(low, "transformer_2"), path)
    same(merged(tiny, path), tiny.changed(high))
    same(merged(tiny, path, part="transformer_2"), tiny.changed(low))
    save_file(as_diffusers(low, "transformer_2"), path)
    with pytest.raises(
        WeightsError,
        match="not a LoRA of the transformer of this model:\n  it holds nothing for it",
    ):
        open_lora(path, tiny.model)


def test_a_file_of_the_second_expert_may_name_the_first(tiny, tmp_path):
    low, path = tiny.factors(in_blocks(tiny)[:5]), tmp_path / "low.safetensors"
    save_file(
        as_diffusers(low),
        path,
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6})},
    )
    same(merged(tiny, path, part="transformer_2"), tiny.changed(low, scales(low, 6)))


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_peft(adapter, tiny, tmp_path):
    factors = tiny.factors(in_blocks(tiny))
    save_file(
        {
            f"base_model.model.{layer}.lora_{half}{adapter}.weight": value
            for layer, pair in factors.items()
            for half, value in zip("AB", pair, strict=True)
        },
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "use_dora": False, "alpha_pattern": {}}
        )
    )
    same(merged(tiny, tmp_path), tiny.changed(factors, scales(factors, 12)))


@pytest.mark.parametrize(
    ("prefix", "names", "alpha"),
    [
        ("diffusion_model.", ("lora_down", "lora_up"), 2.0),
        ("diffusion_model.", ("lora_A", "lora_B"), None),
        ("model.diffusion_model.", ("lora_down", "lora_up"), None),
        ("", ("lora_A.default", "lora_B.default"), None),  # of DiffSynth
    ],
)
def test_comfyui(prefix, names, alpha, tiny, tmp_path):
    factors, path = tiny.factors(tiny.layers), tmp_path / "lora.safetensors"
    save_file(as_comfyui(factors, prefix, names, alpha), path)
    same(merged(tiny, path), tiny.changed(factors, scales(factors, alpha) if alpha else 1.0))


def test_whole_differences(tiny, tmp_path):
    """lightx2v's files: of biases, norms, tables and some weights."""
    factors = tiny.factors(in_blocks(tiny))
    diffs = {
        key: 0.1 * normal(*w.shape)
        for key, w in tiny.weights.items()
        if w.ndim == 1 or "proj_out" in key or "table" in key
    }
    assert {
        "blocks.1.attn1.norm_q.weight",
        "blocks.0.attn1.to_k.bias",
        "proj_out.weight",
        "blocks.0.scale_shift_table",
        "blocks.1.norm2.bias",
    } <= diffs.keys()
    named = {}
    for key, value in diffs.items():
        layer, _, leaf = key.rpartition(".") if key.endswith(("weight", "bias")) else (key, "", "")
        kind = "diff_b" if leaf == "bias" else "diff"
        named[f"diffusion_model.{original_name(layer)}.{kind}"] = value
    path = tmp_path / "lora.safetensors"
    save_file(as_comfyui(factors, alpha=4.0) | named, path)
    same(merged(tiny, path), tiny.changed(factors, scales(factors, 4.0), diffs))
    change = open_lora(path, tiny.model)
    half = WeightDelta(change.factors, change.deltas, 0.5)
    same(
        adapt(tiny.params, half, merge=True),
        tiny.changed(
            factors,
            {k: v / 2 for k, v in scales(factors, 4.0).items()},
            {k: v / 2 for k, v in diffs.items()},
        ),
    )


@pytest.mark.parametrize("undotted", [False, True])
def test_differences_of_the_modulation(undotted, tiny, tmp_path):
    diffs = {key: normal(*w.shape) for key, w in tiny.weights.items() if "table" in key}
    named = {}
    for key, value in diffs.items():
        layer = original_name(key).removesuffix(".modulation")
        prefix, layer = ("lora_unet_", layer.replace(".", "_")) if undotted else ("", layer)
        named[f"{prefix}{layer}.diff_m"] = value
    save_file(named, tmp_path / "lora.safetensors")
    assert len(diffs) == 3  # of two blocks and of the head
    same(merged(tiny, tmp_path), tiny.changed({}, diffs=diffs))


def test_a_bias_of_b_is_scaled(tiny, tmp_path):
    factors, path = tiny.factors(in_blocks(tiny)[:3]), tmp_path / "lora.safetensors"
    biases = {f"{layer}.bias": normal(len(b)) for layer, (_, b) in factors.items()}
    noted = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 9})}
    save_file(
        as_diffusers(factors)
        | {f"transformer.{k.removesuffix('.bias')}.lora_B.bias": v for k, v in biases.items()},
        path,
        noted,
    )
    scale = scales(factors, 9)
    same(
        merged(tiny, path),
        tiny.changed(
            factors, scale, {k: scale[k.removesuffix(".bias")] * v for k, v in biases.items()}
        ),
    )


@pytest.mark.parametrize("dots", range(4))
def test_kohya(dots, tiny, tmp_path):
    """Every dot of a name is an underscore, or some are, or none, after either prefix."""
    factors, path = tiny.factors(tiny.layers), tmp_path / "lora.safetensors"
    arrays = as_kohya(factors, 1.5)
    for layer in factors:
        old, new = original_name(layer).replace(".", "_"), original_name(layer)
        if dots == 1:
            new = new.replace(".", "_", 1)
        if dots:
            for leaf in ("lora_down.weight", "lora_up.weight", "alpha"):
                prefix = "lora_unet." if dots == 3 else "lora_unet_"
                arrays[f"{prefix}{new}.{leaf}"] = arrays.pop(f"lora_unet_{old}.{leaf}")
    save_file(arrays, path)
    same(merged(tiny, path), tiny.changed(factors, scales(factors, 1.5)))


@pytest.mark.parametrize(
    ("kind", "value", "dtype"),
    [
        ("lora_down.weight", np.nan, np.float32),
        ("lora_up.weight", np.inf, np.float16),
        ("lora_up.weight", -np.inf, ml_dtypes.bfloat16),
        ("alpha", np.nan, ml_dtypes.bfloat16),
        ("diff_b", np.inf, np.float32),
    ],
)
def test_values_that_are_not_finite_are_refused_with_their_key(value, kind, dtype, tiny, tmp_path):
    factors, path = tiny.factors(in_blocks(tiny)[:3]), tmp_path / "lora.safetensors"
    layer = f"diffusion_model.{original_name(in_blocks(tiny)[1])}"
    arrays = as_comfyui(factors, alpha=4.0) | {f"{layer}.diff_b": normal(48)}
    arrays = {key: array.astype(dtype) for key, array in arrays.items()}
    save_file(arrays, path)
    open_lora(path, tiny.model)  # the control

    arrays[f"{layer}.{kind}"].reshape(-1)[-1] = value
    save_file(arrays, path)
    with pytest.raises(WeightsError, match=rf"{re.escape(f'{layer}.{kind}')} holds NaN or inf"):
        open_lora(path, tiny.model)


def test_control_blocks(randomise, tmp_path):
    vace = Tiny(
        {
            **TINY,
            "in_channels": 4,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "num_layers": 4,
            "vace_layers": [0, 2],
            "vace_in_channels": 12,
        },
        randomise,
    )
    factors = vace.factors(vace.layers)
    assert {"vace_blocks.1.attn1.to_q", "vace_blocks.0.proj_in"} <= factors.keys()
    save_file(as_comfyui(factors), tmp_path / "lora.safetensors")
    same(merged(vace, tmp_path), vace.changed(factors))


def test_a_wrong_order_of_channels_is_seen(tiny, tmp_path, monkeypatch):
    """Queries and keys are stored in another order here; factors must move with them."""
    factors, path = tiny.factors(in_blocks(tiny)), tmp_path / "lora.safetensors"
    save_file(as_diffusers(factors), path)
    want = tiny.changed(factors)
    monkeypatch.setattr(wan_keys, "halves", lambda heads: LINEAR)
    differs(merged(tiny, path), want)


# Written, and read by others.


def our_factors(tiny, tmp_path, layers):
    save_file(as_diffusers(tiny.factors(layers)), tmp_path / "seed.safetensors")
    return open_lora(tmp_path / "seed.safetensors", tiny.model).factors


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_what_is_written_is_read(layout, tiny, tmp_path):
    factors = our_factors(tiny, tmp_path, tiny.layers)
    path = tmp_path / "out.safetensors"
    write_lora(path, factors, tiny.model, scale=0.25, layout=layout)
    want = adapt(tiny.params, WeightDelta(factors, weight=0.25), merge=True)
    same(merged(tiny, path), want)
    with pytest.raises(ConfigError, match="Did you mean 'comfyui'"):
        write_lora(path, factors, tiny.model, layout="comfui")


def test_a_table_without_a_layer_says_so(tiny, tmp_path):
    factors = {"network": {"stranger": {"lora_a": normal(4, 2), "lora_b": normal(2, 4)}}}
    with pytest.raises(WeightsError, match=r"network/stranger/lora_a: no row"):
        write_lora(tmp_path / "out.safetensors", factors, tiny.model)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def read(torch):
    """{key: array} as diffusers' pipeline loads a file; it converts the layouts of others."""
    pipeline = pytest.importorskip("diffusers").WanPipeline
    return lambda path: {
        k: v.float().numpy()
        for k, v in pipeline.lora_state_dict(
            str(path.parent), weight_name=path.name, local_files_only=True
        ).items()
    }


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_diffusers_reads_what_is_written(layout, tiny, read, tmp_path):
    factors = our_factors(tiny, tmp_path, in_blocks(tiny))
    path = tmp_path / "out.safetensors"
    write_lora(path, factors, tiny.model, layout=layout)
    got = read(path)
    want = as_diffusers(tiny.factors(in_blocks(tiny)))
    assert got.keys() == want.keys()
    pairs = {
        layer: (
            got[f"transformer.{layer}.lora_A.weight"],
            got[f"transformer.{layer}.lora_B.weight"],
        )
        for layer in in_blocks(tiny)
    }
    same(tiny.changed(pairs), adapt(tiny.params, WeightDelta(factors), merge=True))


@pytest.mark.parametrize("write_as", ["comfyui", "kohya"])
def test_their_reading_of_other_layouts_is_ours(write_as, tiny, read, tmp_path):
    factors, path = tiny.factors(in_blocks(tiny)), tmp_path / "lora.safetensors"
    save_file(
        as_comfyui(factors, alpha=8.0) if write_as == "comfyui" else as_kohya(factors, 8.0), path
    )
    theirs = tmp_path / "theirs.safetensors"
    save_file(read(path), theirs)
    same(merged(tiny, path), merged(tiny, theirs))


def test_the_prediction_is_that_of_diffusers(tiny, torch, read, tmp_path, monkeypatch):
    from diffusers import WanTransformer3DModel

    from vdx.interop.save import save_folder

    monkeypatch.setattr(WanTransformer3DModel, "_keep_in_fp32_modules", None)
    shapes = {key: w.shape for key, w in tiny.weights.items()}
    save_folder(tiny.params, tiny.rows, wan_config(shapes, head_width=24), tmp_path / "model")
    network = WanTransformer3DModel.from_pretrained(tmp_path / "model").eval()
    factors = our_factors(tiny, tmp_path, in_blocks(tiny))
    path = tmp_path / "out.safetensors"
    write_lora(path, factors, tiny.model, scale=0.7)
    there = read(path)
    with torch.no_grad():
        for name, p in network.named_parameters():
            layer = f"transformer.{name.removesuffix('.weight')}"
            if f"{layer}.lora_A.weight" in there:
                p += torch.from_numpy(
                    there[f"{layer}.lora_B.weight"] @ there[f"{layer}.lora_A.weight"]
                )
        x, concat = normal(2, 2, 4, 6, 4), normal(2, 2, 4, 6, 8)
        text, image = normal(2, 512, 16), normal(2, 7, 20)
        time = np.array([37.3, 803.0], np.float32)
        moved = np.moveaxis(np.concatenate([x, concat], -1), -1, 1)
        want = network(
            torch.from_numpy(np.ascontiguousarray(moved)),
            torch.from_numpy(time),
            torch.from_numpy(text),
            torch.from_numpy(image),
        ).sample
    batch = {
        "text": text,
        "text_mask": np.ones((2, 512), bool),
        "concat": concat,
        "image_tokens": image,
    }
    keep = tiny.model.drop_masks(2, False)
    run = jax.jit(
        lambda p: tiny.model.run(p, x, time, batch, keep, method="train_view"),
    )
    want = np.moveaxis(want.numpy(), 1, -1)
    got = run(adapt(tiny.params, WeightDelta(factors, weight=0.7)))
    assert want.std() > 0.3 and np.abs(got - want).max() < 1e-4
    without = run(adapt(tiny.params, WeightDelta(factors, weight=0.0)))
    assert np.abs(without - want).max() > 0.05


# Files that are not of this model.


def test_a_lora_of_another_model_names_what_does_not_fit(tiny, tmp_path):
    factors, path = tiny.factors(in_blocks(tiny)), tmp_path / "lora.safetensors"
    good = as_diffusers(factors)
    wide = {"transformer.blocks.0.attn1.to_v.lora_A.weight": normal(3, 52)}
    bad = {
        "transformer.blocks.7.attn1.to_q.lora_A.weight": normal(3, 48),
        "text_encoder.layers.0.q.lora_A.weight": normal(3, 48),
        "transformer.blocks.0.attn1.to_q.dora_scale": normal(48),
        "transformer.blocks.0.attn1.norm_q.diff": normal(49),
        "transformer.patch_embedding.alpha": np.array(1, np.float32),
    }
    save_file(good | wide | bad, path)
    with pytest.raises(WeightsError) as error:
        open_lora(path, tiny.model)
    for part in (
        f"{path} is not a LoRA of the transformer of this model:",
        "transformer.blocks.7.attn1.to_q.lora_A.weight: no such layer in this model",
        "text_encoder.layers.0.q.lora_A.weight: no such layer",
        "transformer.blocks.0.attn1.to_q.dora_scale: unknown kind",
        "blocks.0.attn1.to_v: lora_A is (3, 52) and lora_B",
        "blocks.0.attn1.norm_q, diff: is (49,) for blocks.0.attn1.norm_q.weight (48,)",
        "patch_embedding: has alpha without its partners",
    ):
        assert part in str(error.value)
    assert str(error.value).count("\n") == len(bad) + len(wide)


@pytest.mark.parametrize("missing", ["A", "B"])
def test_a_half_without_its_partner(missing, tiny, tmp_path):
    arrays = as_diffusers(tiny.factors(in_blocks(tiny)))
    del arrays[f"transformer.blocks.0.attn1.to_q.lora_{missing}.weight"]
    save_file(arrays, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn1\.to_q: has [AB] without its partner"):
        open_lora(tmp_path / "lora.safetensors", tiny.model)


def test_one_layer_under_two_names(tiny, tmp_path):
    factors = tiny.factors(["blocks.0.attn1.to_q"])
    save_file(as_diffusers(factors) | as_kohya(factors, 1.0), tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=r"a second A for blocks\.0\.attn1\.to_q"):
        open_lora(tmp_path / "lora.safetensors", tiny.model)


def test_a_dora_is_refused(tiny, tmp_path):
    save_file(
        as_diffusers(tiny.factors(in_blocks(tiny))),
        tmp_path / "lora.safetensors",
        {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})},
    )
    with pytest.raises(WeightsError, match="is a DoRA"):
        open_lora(tmp_path / "lora.safetensors", tiny.model)


def test_a_lora_of_text_to_video_fits_image_to_video(tiny, tmp_path):
    layers = [layer for layer in in_blocks(tiny) if "add_" not in layer]
    factors = tiny.factors(layers)
    save_file(as_diffusers(factors), tmp_path / "lora.safetensors")
    same(merged(tiny, tmp_path), tiny.changed(factors))
