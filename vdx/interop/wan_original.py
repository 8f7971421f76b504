"""The original Wan's folders, and single files such as ComfyUI's, as a PublicModel.

They come without most of the configs, which are known or follow from the arrays' shapes, and say
what they are by their names: `high_noise_model` and `low_noise_model`, or
`diffusion_pytorch_model*.safetensors`; `models_t5_*.pth`; `models_clip_*.pth`; `Wan2.?_VAE.pth`;
`google/umt5-xxl`.
References: the configs in wan/configs of Wan-Video/Wan2.1 and Wan2.2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdx.files import read_json
from vdx.interop.components import open_component
from vdx.interop.encoders import clip_vision_config
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.load import open_weights
from vdx.interop.pretrained import VACE, PretrainedModel, assemble
from vdx.interop.stored_array import StoredArray
from vdx.interop.vae import VIDEO_VAES

# part: where it may lie in the folder, relative patterns
PLACES = {
    "transformer": ("high_noise_model", "diffusion_pytorch_model*.safetensors"),
    "transformer_2": ("low_noise_model",),
    "text_encoder": ("models_t5_*.pth",),
    "tokenizer": ("google/umt5-xxl",),
    "vae": ("Wan2.?_VAE.pth",),
    "image_encoder": ("models_clip_*.pth",),
}
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "lower_order_final": True,
    "disable_corrector": [],
}


def open_original(
    path: str | Path, given: Mapping[str, str | Path], dtype: str = "float32"
) -> PretrainedModel:
    """The model whose transformer is in `path`, a folder or a file; `given`: where other parts
    are, a row of PLACES each, if not beside it. Reads headers.

    Raises WeightsError that lists the parts that are not there, or as `open_public`.
    """
    path = Path(path)
    places = {part: found for part in PLACES if (found := _find(part, path)) is not None}
    places |= {part: Path(where) for part, where in given.items()}
    wanted = ["transformer", "text_encoder", "tokenizer", "vae"]
    lost = [
        f"{part}: {' or '.join(PLACES[part])} (--{part}=...)"
        for part in wanted
        if part not in places
    ]
    lost += [
        f"{part}: {where} is not there" for part, where in places.items() if not where.exists()
    ]
    if lost:
        raise WeightsError(
            listed(
                f"{path} is neither a folder of diffusers nor one of the "
                "original Wan's with all its parts. It lacks:",
                lost,
            )
        )
    tokenizer = places.pop("tokenizer")
    components = {
        part: open_component(part, where, dtype, _config(part, where))
        for part, where in places.items()
    }
    first, held = components["transformer"], components["vae"].module.z_dim == 48
    pictures, experts = "concat" in first.module.signals, "transformer_2" in components
    ends = first.module.signals.get("image_tokens", {}).get("positions")
    control = "control" in first.module.signals
    index: dict[str, Any] = {
        "_class_name": VACE
        if control
        else "WanImageToVideoPipeline"
        if pictures
        else "WanPipeline",
        "boundary_ratio": (0.9 if pictures else 0.875) if experts else None,
        "scheduler": ["diffusers", UNIPC["_class_name"]],
        "tokenizer": ["transformers", _tokenizer_class(tokenizer)],
    }
    if not control:
        index["expand_timesteps"] = held
    kinds = {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "transformer": ["diffusers", first.config["_class_name"]],
        "transformer_2": ["diffusers", first.config["_class_name"]],
    }
    if pictures:
        kinds["image_processor"] = ["transformers", "CLIPImageProcessor"]
    else:
        kinds.pop("image_encoder")
    there = {*components, *(["image_processor"] if "image_encoder" in components else [])}
    index |= {part: kinds[part] if part in there else [None, None] for part in kinds}
    shift = 12.0 if experts and not pictures else 16.0 if ends or control else 5.0
    return assemble(path, dtype, index, UNIPC | {"flow_shift": shift}, tokenizer, components)


def _tokenizer_class(folder: Path) -> str:
    """What diffusers is to read it with."""
    config = folder / "tokenizer_config.json"
    said = str(read_json(config).get("tokenizer_class", "T5")) if config.exists() else "T5"
    return "T5TokenizerFast" if said.startswith("T5") else said


def _find(part: str, path: Path) -> Path | None:
    """Where a part lies; the transformer in the folder itself is meant by that folder."""
    if path.is_file():
        return path if part == "transformer" else None
    for pattern in PLACES[part]:
        for found in sorted(path.glob(pattern)):
            return path if part == "transformer" and found.is_file() else found
    return None


def _config(part: str, where: Path) -> dict[str, Any] | None:
    """The config of a file that comes without one; None where one lies beside it, or is not
    needed."""
    if part.startswith("transformer") or (where / "config.json").exists():
        return None
    known = {"text_encoder": umt5_config, "image_encoder": clip_vision_config, "vae": vae_config}
    return known[part](open_weights(where)) if part in known else None


def umt5_config(source: Mapping[str, StoredArray]) -> dict[str, Any]:
    """The config.json of transformers for a UMT5 in the original's layout or in its own.

    Raises WeightsError for other arrays.
    """
    names = (
        (
            "token_embedding.weight",
            "blocks.{}.attn.q.weight",
            "blocks.{}.ffn.fc1.weight",
            "blocks.0.pos_embedding.embedding.weight",
        ),
        (
            "shared.weight",
            "encoder.block.{}.layer.0.SelfAttention.q.weight",
            "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    )
    found = next((n for n in names if n[0] in source and n[3] in source), None)
    if found is None:
        raise WeightsError(
            "These are not the weights of a UMT5 encoder; they begin with "
            f"{', '.join(list(source)[:3])}."
        )
    words, query, up, bias = found
    (vocabulary, width), (buckets, heads) = source[words].shape, source[bias].shape
    depth = next(i for i in range(len(source)) if query.format(i) not in source)
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": source[query.format(0)].shape[0] // heads,
        "d_ff": source[up.format(0)].shape[0],
        "num_layers": depth,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }


def vae_config(source: Mapping[str, StoredArray]) -> dict[str, Any]:
    """The config.json of diffusers for the VAE of Wan 2.1 or 2.2, which the number of its latent
    channels tells apart, or for one of other widths. Raises WeightsError for another."""
    names = (
        ("conv2.weight", "encoder.conv1.weight", "decoder.head.0.gamma"),
        ("post_quant_conv.weight", "encoder.conv_in.weight", "decoder.norm_out.gamma"),
    )
    found = next((n for n in names if all(k in source for k in n)), None)
    sizes = [source[key].shape[0] for key in found or ()]
    kinds = {16: "wan2.1", 48: "wan2.2"}
    if found is None or sizes[0] not in kinds:
        raise WeightsError(
            "These are not the weights of Wan's VAE; they begin with "
            f"{', '.join(list(source)[:3])}."
        )
    return {
        "_class_name": "AutoencoderKLWan",
        **VIDEO_VAES[kinds[sizes[0]]],
        "base_dim": sizes[1],
        "decoder_base_dim": sizes[2],
    }
