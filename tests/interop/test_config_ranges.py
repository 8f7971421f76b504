"""Every field of makers' JSON files against values that no model has: refused, or without effect.

The folders have the layouts of tiny public models, with zeros for weights. Only headers are read.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError, check_entries
from vdx.files import FileError, write_json
from vdx.interop import (
    clip,
    components,
    image_processor,
    latte,
    lora,
    pretrained,
    schedulers,
    t5,
    unet,
    unet_config,
    video_vae,
    wan_config,
)
from vdx.interop.components import open_component
from vdx.interop.config_ranges import read_config
from vdx.interop.keymap import WeightsError
from vdx.interop.load import open_weights
from vdx.interop.save import export_plan, write_shards
from vdx.interop.wan_keys import wan_transformer_rows
from vdx.models.denoiser import Denoiser

NUMBERS = (0, -1, 1.5, 10**12, 2**63 - 1, 1e300, True)
HOSTILE = (*NUMBERS, "abc", "", None, [], [0], [-1] * 3, [[1]], {})

T5 = {
    "model_type": "umt5",
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 10,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 20,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 8,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 8,
    "decoder_base_dim": None,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "patch_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.7, 1.0, 2.0],
    "dropout": 0.0,
}
WAN = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
    "rope_max_seq_len": 1024,
    "num_frame_per_block": 1,
    "inject_sample_info": False,
}
VACE = WAN | {
    "_class_name": "WanVACETransformer3DModel",
    "vace_layers": [0, 1],
    "vace_in_channels": 72,
}
LATTE = {
    "_class_name": "LatteTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 12,
    "video_length": 4,
}
UNET = {
    "_class_name": "UNetMotionModel",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlockMotion", "DownBlockMotion"],
    "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion"],
    "num_attention_heads": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "use_motion_mid_block": True,
    "motion_num_attention_heads": 2,
    "act_fn": "silu",
    "sample_size": 8,
}
CONTROLNET = {
    "_class_name": "SparseControlNetModel",
    "in_channels": 4,
    "down_block_types": UNET["down_block_types"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "motion_num_attention_heads": 2,
    "conditioning_channels": 4,
    "conditioning_embedding_out_channels": None,
    "concat_conditioning_mask": True,
    "use_simplified_condition_embedding": True,
}
ADAPTER = {
    "_class_name": "MotionAdapter",
    "block_out_channels": [8, 16],
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 4,
    "motion_num_attention_heads": 2,
    "use_motion_mid_block": True,
}
INDEX = {
    "_class_name": "WanPipeline",
    "boundary_ratio": None,
    "expand_timesteps": False,
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "image_encoder": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "_diffusers_version": "0.35.0",
}
SCHEDULER = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "solver_order": 2}
PEFT = {"lora_alpha": 4, "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "r": 2}


class Layout(NamedTuple):
    """A folder of a public model, and what reads it."""

    config: Mapping[str, Any]  # the honest fields
    fields: Mapping[str, Any]  # of those that are read, the hints
    write: Callable[[Path], None]  # the other files of the folder
    open: Callable[[Path], Any]  # path of the JSON file -> what it says, comparable
    file: str = "config.json"


def zeros(folder, plan, stem="model"):
    write_shards(folder, stem, plan, ((k, np.zeros(*facts)) for k, facts in plan.items()))


def component(name, config, fields, module, rows, *inputs):
    """A network of COMPONENTS; inputs: shapes and dtypes that its parameters follow from."""

    def write(folder):
        shapes = components._init_shapes(module, *inputs)
        zeros(folder, export_plan(shapes, rows))

    def read(path):
        opened = open_component(name, path.parent, "float32")
        components.match_params(opened.source, opened.shapes, opened.rows)
        return opened.module

    return Layout(config, fields, write, read)


def denoiser_shapes(model):
    return jax.eval_shape(model.new_params, jax.random.key(0))


def wan_layout(config):
    model = Denoiser(*wan_config.wan_from_config(config))

    def write(folder):
        zeros(folder, export_plan(denoiser_shapes(model), wan_transformer_rows(model)))

    def read(path):
        opened = open_component("transformer", path.parent, "float32")
        components.match_params(opened.source, opened.shapes, opened.rows)
        return opened.module

    return Layout(config, wan_config.FIELDS, write, read)


def reader(config, fields, read, file="config.json", array="a.weight"):
    """A JSON file whose reading needs no weights, or the name of one array."""

    def write(folder):
        zeros(folder, {array: ((1,), np.dtype(np.float32))})

    return Layout(config, fields, write, read, file)


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def layouts():
    """Return every layout by name."""
    encoder, vision = t5.t5_from_config(T5), clip.clip_vision_from_config(VISION)
    vae = video_vae.video_vae_from_config(VAE)
    ids = (abstract((1, 4), jnp.int32), abstract((1, 4), jnp.bool_))
    picture = abstract((1, 28, 28, 3), jnp.float32)
    pixel = abstract((1, 1, 8, 8, 3), jnp.float32)
    around = {"model_type": "clip", "vision_config": VISION}

    def unet_part(other):
        """Return the reader of one of the parts that make a U-Net."""

        def read(path):
            folder = path.parent / "other"
            if other and not folder.exists():
                zeros(folder, {"b.weight": ((1,), np.dtype(np.float32))})
                write_json(folder / "config.json", other)
            paths = [path.parent, folder] if other else [path.parent]
            opened = unet.open_unet(paths)
            fields = opened.denoiser_fields()
            model = Denoiser(*fields)
            model.backbone.dims()
            list(unet.find_differences(model, opened.configs, opened.base))
            return fields

        return read

    image = UNET | {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    made = {
        "text encoder": component(
            "text_encoder", T5, t5.FIELDS, encoder, t5.t5_rows(("shared.weight",), encoder), *ids
        ),
        "image encoder": component(
            "image_encoder", VISION, clip.FIELDS, vision, clip.clip_rows((), vision), picture
        ),
        "image encoder of a whole CLIP": component(
            "image_encoder", around, clip.FIELDS, vision, clip.clip_rows((), vision), picture
        ),
        "vae": component("vae", VAE, video_vae.FIELDS, vae, video_vae.video_vae_rows(vae), pixel),
        "wan": wan_layout(WAN),
        "vace": wan_layout(VACE),
        "latte": reader(
            LATTE, latte.FIELDS, lambda path: latte.latte_denoiser(read_config(path, latte.FIELDS))
        ),
        "unet": reader(UNET, unet_config.FIELDS, unet_part(None)),
        "motion adapter": reader(ADAPTER, unet_config.FIELDS, unet_part(image)),
        "control": reader(CONTROLNET, unet_config.FIELDS, unet_part(UNET)),
        "scheduler": reader(
            SCHEDULER,
            schedulers.FIELDS,
            lambda path: schedulers.schedule_of(read_config(path, schedulers.FIELDS), path),
            "scheduler_config.json",
        ),
        "image processor": reader(
            image_processor.processor_config(28),
            {},
            read_processor,
            "preprocessor_config.json",
        ),
        "lora": reader(
            PEFT,
            lora.SETTINGS,
            read_lora,
            "adapter_config.json",
            "base_model.a",
        ),
    }

    def write_model(folder):
        parts = {"text_encoder": "text encoder", "transformer": "wan", "vae": "vae"}
        for part, name in parts.items():
            made[name].write(folder / part)
            write_json(folder / part / "config.json", made[name].config)
        (folder / "tokenizer").mkdir()
        (folder / "scheduler").mkdir()
        write_json(folder / pretrained.SCHEDULER, SCHEDULER)

    def read_model(path):
        model = pretrained.open_pretrained(path.parent)
        return model.boundary, model.clamps_first_frame, [*model.components], model.schedule()

    made["index"] = Layout(
        INDEX, pretrained.INDEX_FIELDS, write_model, read_model, pretrained.INDEX
    )
    return made


def read_processor(path):
    differences = image_processor.processor_differences(read_config(path, {}), 28)
    if differences:
        raise WeightsError(", ".join(differences))


def read_lora(path):
    settings = lora._read_settings(path.parent, open_weights(path.parent), "transformer")
    return lora._scale("blocks.0.attn1.to_q", 2, None, settings)


LAYOUTS = layouts()


def cached_by_text(function):
    """Return a function of a method and abstract inputs that is evaluated once for each."""
    results = {}

    def cached(method, *inputs):
        key = repr((method, inputs))
        if key not in results:
            results[key] = function(method, *inputs)
        return results[key]

    return cached


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (layout, its folder, what its honest file says)."""
    monkeypatch = pytest.MonkeyPatch()
    # A whole model's parts are the same in every case.
    monkeypatch.setattr(pretrained, "open_component", functools.cache(pretrained.open_component))
    # Most cases that are read are of the honest network, whose shapes are the same.
    monkeypatch.setattr(jax, "eval_shape", cached_by_text(jax.eval_shape))
    made = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp("layout") / "model"
        layout.write(folder)
        write_json(folder / layout.file, layout.config)
        made[name] = layout, folder / layout.file, layout.open(folder / layout.file)
    yield made
    monkeypatch.undo()


def places(config, above=()):
    """Yield (keys that lead to a field, of objects within objects too)."""
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def changed(config, place, value):
    """Return a config with another value at a place."""
    key, *below = place
    return {**config, key: changed(config[key], below, value) if below else value}


def allows(fields, place, value):
    """Return whether the hints of a layout admit a value at a place; None: nobody reads it."""
    key, *below = place
    if key not in fields:
        return None
    if below:
        return allows(fields[key], below, value)
    try:
        check_entries({key: value}, fields, "")
    except ConfigError:
        return False
    return True


# Of these layouts another one has every field too.
SLOW = ("wan", "image encoder")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS]
)
def test_a_hostile_value_is_refused_by_name_or_has_no_effect(name, folders):
    layout, path, honest = folders[name]
    refused = 0
    for place in places(layout.config):
        for value in HOSTILE:
            write_json(path, changed(layout.config, place, value))
            admitted = allows(layout.fields, place, value)
            try:
                found = layout.open(path)
            except (ConfigError, WeightsError, FileError) as error:
                refused += 1
                assert place[-1] in str(error) or admitted is not False, (place, value)
                assert path.name in str(error) or admitted is not False, (place, value)
                continue
            assert admitted or found == honest, (place, value, found)
    write_json(path, layout.config)
    assert refused
