"""Configs of Wan transformers: of diffusers, from the shapes of arrays, and ours."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vdx.interop.keymap import WeightsError, listed

# Of diffusers. Without and with control, and SkyReels'; what no public model has another value for.
CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
SKYREELS = "SkyReelsV2Transformer3DModel"
FIXED = {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6}


def wan_config(shapes: Mapping[str, Sequence[int]], head_width: int) -> dict[str, Any]:
    """The `config.json` of diffusers for arrays of these names and shapes, which do not tell the
    width of a head.

    Raises WeightsError for arrays that are not of a Wan transformer.
    """
    at = "condition_embedder"
    patch_key, out_key, text_key, time_key, mlp_key = needed = (
        "patch_embedding.weight",
        "proj_out.weight",
        f"{at}.text_embedder.linear_1.weight",
        f"{at}.time_embedder.linear_1.weight",
        "blocks.0.ffn.net.0.proj.weight",
    )
    if missing := [key for key in needed if key not in shapes]:
        raise WeightsError(
            listed(
                "These are not the weights of a Wan transformer. They begin with "
                f"{', '.join(list(shapes)[:3])} and lack:",
                missing,
            )
        )
    (width, channels, *patch), depth = shapes[patch_key], _count(shapes, "blocks")
    if width % head_width:
        raise WeightsError(
            f"The weights are {width} wide, which is no number of heads of "
            f"{head_width}: attention_head_dim is another."
        )
    config: dict[str, Any] = {
        "_class_name": CLASSES[0],
        "patch_size": patch,
        "num_attention_heads": width // head_width,
        "attention_head_dim": head_width,
        "in_channels": channels,
        "out_channels": shapes[out_key][0] // math.prod(patch),
        "text_dim": shapes[text_key][1],
        "freq_dim": shapes[time_key][1],
        "ffn_dim": shapes[mlp_key][0],
        "num_layers": depth,
        **FIXED,
        "rope_max_seq_len": 1024,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    }
    if f"{at}.image_embedder.norm1.weight" in shapes:
        config |= {
            "image_dim": shapes[f"{at}.image_embedder.norm1.weight"][0],
            "added_kv_proj_dim": width,
        }
    if f"{at}.image_embedder.pos_embed" in shapes:
        config["pos_embed_seq_len"] = shapes[f"{at}.image_embedder.pos_embed"][1]
    if "vace_patch_embedding.weight" in shapes:
        controls = _count(shapes, "vace_blocks")
        config |= {
            "_class_name": CLASSES[1],
            "vace_in_channels": shapes["vace_patch_embedding.weight"][1],
            "vace_layers": list(range(0, depth, -(-depth // controls))),
        }
    if "fps_embedding.weight" in shapes:
        config |= {"_class_name": SKYREELS, "inject_sample_info": True}
    return config


def _count(shapes: Mapping[str, Any], stack: str) -> int:
    return 1 + max(int(m[1]) for key in shapes if (m := re.match(rf"{stack}\.(\d+)\.", key)))


def wan_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(backbone, signals) of a Denoiser for a `config.json` of diffusers.

    Raises WeightsError that lists what is missing and what our transformer cannot be.
    """
    get = config.get
    sizes = (
        "patch_size",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "out_channels",
        "text_dim",
        "ffn_dim",
        "num_layers",
    )
    problems = [f"{key}: is missing" for key in sizes if get(key) is None]
    if problems:
        raise WeightsError(listed("This is not the config of a Wan transformer:", problems))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    depth, extra = config["num_layers"], config["in_channels"] - config["out_channels"]
    controls = get("vace_layers") or ()
    every = -(-depth // len(controls)) if controls else 1
    block = get("num_frame_per_block", 1)
    wanted = {
        "_class_name": SKYREELS if get("_class_name") == SKYREELS else CLASSES[bool(controls)],
        "freq_dim": 256,
        **FIXED,
        "added_kv_proj_dim": width if get("image_dim") else None,
    }
    problems = [
        f"{key} = {config[key]!r}, not {value!r}"
        for key, value in wanted.items()
        if key in config and config[key] != value
    ]
    if controls and (depth % every or list(controls) != list(range(0, depth, every))):
        problems.append(
            f"vace_layers = {list(controls)} are not evenly spaced from 0 over {depth} layers"
        )
    if extra < 0:
        problems.append("in_channels is less than out_channels")
    if problems:
        raise WeightsError(listed("A Wan transformer that vdx does not have:", problems))
    mixer = {"name": "full", "block": block} if block > 1 else "full"  # theirs is no mask for 1
    backbone = {
        "name": "transformer",
        "channels": config["out_channels"],
        "patch": tuple(config["patch_size"]),
        "pattern": (mixer,) * every,
        "width": width,
        "depth": depth,
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["ffn_dim"] / width,
    }
    signals: dict[str, Any] = {"embeddings": {"features": config["text_dim"], "length": 512}}
    if get("inject_sample_info"):
        signals["fps_class"] = {}
    if extra:
        signals["concat"] = {"channels": extra}
    if get("image_dim"):
        signals["image_tokens"] = {
            "features": config["image_dim"],
            "positions": get("pos_embed_seq_len") or 0,
        }
    if controls:
        signals["control"] = {"channels": config["vace_in_channels"]}
    return backbone, signals
