"""Public U-Nets as those of vdx.models.unet, and back: of images, with motion modules, 3D.

References: `UNet2DConditionModel`, `UNetMotionModel`, `UNet3DConditionModel` and `MotionAdapter` of
diffusers. A network may lie in several folders, such as an image model and a motion adapter.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from vdx.files import read_json, write_json
from vdx.interop.keymap import CONV, KEEP, LINEAR, Row, WeightsError, export, flat, listed, patches
from vdx.interop.load import (
    abstract_params,
    empty_folder,
    export_plan,
    load_params,
    open_weights,
    write_parts,
)
from vdx.interop.safetensors import Stored
from vdx.interop.vae import dense_rows, norm_rows, residual_rows
from vdx.models.denoiser import Denoiser
from vdx.models.unet import UNet
from vdx.models.unet_blocks import frame_positions
from vdx.types import Params

TOKENS = 77        # of CLIP, all of which are read, also those of the empty caption
# Of diffusers: the class of a whole network -> our `temporal`, and what its blocks are called.
CLASSES = {"UNet2DConditionModel": ("none", "2D"), "UNetMotionModel": ("motion", "Motion"),
           "UNet3DConditionModel": ("3d", "3D")}
ADAPTER = "MotionAdapter"
# What no public model has another value for; a tuple of these means the same.
FIXED = {"flip_sin_to_cos": True, "act_fn": "silu", "norm_eps": 1e-5, "downsample_padding": 1,
         "mid_block_scale_factor": 1, "resnet_time_scale_shift": "default", "conv_in_kernel": 3,
         "conv_out_kernel": 3, "mid_block_type": "UNetMidBlock2DCrossAttn", "mid_block_layers": 1,
         "attention_type": "default", "time_embedding_type": "positional",
         "resnet_out_scale_factor": 1, "transformer_layers_per_block": 1,
         "transformer_layers_per_mid_block": 1, "temporal_transformer_layers_per_block": 1,
         "temporal_transformer_layers_per_mid_block": 1, "motion_transformer_layers_per_block": 1,
         "motion_transformer_layers_per_mid_block": 1, "motion_mid_block_layers_per_block": 1}
# What says nothing about the network (arrays tell whether projections are convolutions), and what
# is read below. Any other key is of something that we do not have, unless it is off.
SILENT = {"sample_size", "upcast_attention", "use_linear_projection", "motion_max_seq_length",
          "addition_embed_type_num_heads"}
READ = {"in_channels", "out_channels", "block_out_channels", "layers_per_block",
        "down_block_types", "up_block_types", "attention_head_dim", "num_attention_heads",
        "norm_num_groups", "cross_attention_dim", "use_motion_mid_block",
        "motion_num_attention_heads", "motion_norm_num_groups", "motion_layers_per_block"}


# The arrays


def _attention(theirs: str, ours: str) -> Iterator[Row]:
    for name in "qkv":
        yield Row(f"{theirs}.to_{name}.weight", f"{ours}/{name}/kernel", LINEAR)
    yield from dense_rows(f"{theirs}.to_out.0", f"{ours}/out", LINEAR)


def _exchange(theirs: str, ours: str, linear: bool) -> Iterator[Row]:
    """`Transformer2DModel`, `TransformerTemporalModel` or a motion module, of one layer."""
    yield from norm_rows(f"{theirs}.norm", f"{ours}/norm")
    for name in ("proj_in", "proj_out"):
        yield from dense_rows(f"{theirs}.{name}", f"{ours}/{name}",
                              LINEAR if linear else patches((1, 1)))
    theirs, ours = f"{theirs}.transformer_blocks.0", f"{ours}/layer"
    for i in (1, 2, 3):
        yield Row(f"{theirs}.norm{i}.weight", f"{ours}/norm{i}/scale", KEEP)
        yield Row(f"{theirs}.norm{i}.bias", f"{ours}/norm{i}/bias", KEEP)
    for i in (1, 2):
        yield from _attention(f"{theirs}.attn{i}", f"{ours}/attn{i}")
    yield from dense_rows(f"{theirs}.ff.net.0.proj", f"{ours}/mlp/up", LINEAR)
    yield from dense_rows(f"{theirs}.ff.net.2", f"{ours}/mlp/down", LINEAR)
    yield Row(f"{theirs}.pos_embed.pe", None)


def _time_convs(theirs: str, ours: str) -> Iterator[Row]:
    for i in range(4):
        yield from norm_rows(f"{theirs}.conv{i + 1}.0", f"{ours}/norm_{i}")
        yield from dense_rows(f"{theirs}.conv{i + 1}.{3 if i else 2}", f"{ours}/conv_{i}",
                              patches((3, 1, 1)))


def _layers(block: str, index: str, ours: str, linear: bool, motion: str) -> Iterator[Row]:
    """What the lists of a block have at one index."""
    yield from residual_rows(f"{block}.resnets.{index}", f"{ours}/res")
    yield from _time_convs(f"{block}.temp_convs.{index}", f"{ours}/time_convs")
    yield from _exchange(f"{block}.attentions.{index}", f"{ours}/space", linear)
    yield from _exchange(f"{block}.{motion}.{index}", f"{ours}/motion", True)


def encoder_rows(theirs: str, ours: str, linear: bool, motion: str) -> Iterator[Row]:
    """The way down and the middle, which a ControlNet has as well."""
    yield from dense_rows(f"{theirs}conv_in", f"{ours}/conv_in", CONV)
    for i, name in ((1, "up"), (2, "down")):
        yield from dense_rows(f"{theirs}time_embedding.linear_{i}", f"{ours}/time/{name}", LINEAR)
    yield from _exchange(f"{theirs}transformer_in", f"{ours}/motion_in", True)
    yield from _layers(f"{theirs}down_blocks.{{i}}", "{j}", f"{ours}/down_{{i}}_{{j}}", linear,
                       motion)
    yield from _layers(f"{theirs}mid_block", "{j}", f"{ours}/middle_{{j}}", linear, motion)
    yield from dense_rows(f"{theirs}down_blocks.{{i}}.downsamplers.0.conv",
                          f"{ours}/down_{{i}}_conv", CONV)


def unet_rows(model: Denoiser, linear: bool | None = None) -> list[Row]:
    """From the keys of diffusers to our parameters. linear: whether the projections around
    attention in space are matrices or convolutions; by default as the public models have it.

    `null`, the dropped text, is not in the files, and zero until it is given.
    """
    temporal = model.parts()[0].dims()[1].temporal
    linear = temporal.convs if linear is None else linear
    motion = "temp_attentions" if temporal.convs else "motion_modules"
    return [*encoder_rows("", "network/encoder", linear, motion),
            *_layers("up_blocks.{i}", "{j}", "network/up_{i}_{j}", linear, motion),
            *dense_rows("up_blocks.{i}.upsamplers.0.conv", "network/up_{i}_conv", CONV),
            *norm_rows("conv_norm_out", "network/norm_out"),
            *dense_rows("conv_out", "network/conv_out", CONV),
            Row("", "conditioning/embeddings/null")]


# The configs


def _single(value: Any) -> Any:
    """What all entries of a list are."""
    if isinstance(value, list | tuple) and len(set(map(str, value))) == 1:
        return _single(value[0])
    return value


def _unknown(config: Mapping[str, Any]) -> list[str]:
    """What a config says that no U-Net of ours is."""
    problems = [f"{key} = {value!r}, not {FIXED[key]!r}" for key, value in config.items()
                if key in FIXED and value is not None and _single(value) != FIXED[key]]
    return problems + [f"{key} = {value!r}: not known" for key, value in config.items()
                       if value and not key.startswith("_") and key not in {*FIXED, *SILENT, *READ}]


def unet_from_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(backbone, signals) of a Denoiser for the `config.json` of a whole network in diffusers.

    Raises WeightsError that lists what is missing and what our U-Net cannot be.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise WeightsError(f"This config is of {name}; U-Nets are {', '.join(CLASSES)}.")
    temporal, kind = CLASSES[name]
    needed = ("in_channels", "out_channels", "block_out_channels", "layers_per_block",
              "down_block_types", "up_block_types", "norm_num_groups", "cross_attention_dim")
    if missing := [f"{key}: is missing" for key in needed if config.get(key) is None]:
        raise WeightsError(listed("This is not the config of a U-Net:", missing))
    problems, widths = _unknown(config), tuple(config["block_out_channels"])
    attention = tuple("CrossAttn" in block for block in config["down_block_types"])
    for way, levels in (("down", attention), ("up", attention[::-1])):
        said = config[f"{way}_block_types"]
        known = [f"{'CrossAttn' * on}{way.title()}Block{kind}" for on in levels]
        if list(said) != known:
            problems.append(f"{way}_block_types = {list(said)}, not {known}")
    layers, extra = (_single(config["layers_per_block"]),
                     config["in_channels"] - config["out_channels"])
    tokens = _single(config["cross_attention_dim"])
    problems += [f"{key} = {value!r} differs from level to level" for key, value in
                 (("layers_per_block", layers), ("cross_attention_dim", tokens))
                 if not isinstance(value, int)]
    if extra < 0:
        problems.append("in_channels is less than out_channels")
    heads, head_width = _heads(config, widths, temporal, problems)
    if problems:
        raise WeightsError(listed("A U-Net that vdx does not have:", problems))
    backbone = {"name": "unet", "channels": config["out_channels"], "widths": widths,
                "layers": layers, "attention": attention, "heads": heads,
                "head_width": head_width, "groups": config["norm_num_groups"],
                "temporal": temporal}
    if temporal == "motion":
        backbone["motion_middle"] = bool(config.get("use_motion_mid_block", True))
    signals: dict[str, Any] = {"embeddings": {
        "features": tokens, "length": TOKENS, "null_tokens": TOKENS, "project": False}}
    if extra:
        signals["concat"] = {"channels": extra}
    return backbone, signals


def _heads(config: Mapping[str, Any], widths: Sequence[int], temporal: str,
           problems: list[str]) -> tuple[int, int]:
    """(heads, head_width) of our U-Net. `attention_head_dim` is the width of a head in 3D, where
    the first module has 8, and the number of heads elsewhere."""
    said = _single(config.get("num_attention_heads") or config.get("attention_head_dim", 8))
    motion = _single(config.get("motion_num_attention_heads", 8))
    if temporal == "3d":
        heads, head_width = 8, said
    elif isinstance(said, int):
        heads, head_width = said, 0
    else:
        heads, head_width = motion, _single([w // n for w, n in zip(widths, said, strict=True)])
    if not isinstance(head_width, int):
        problems.append(f"heads of several widths: {head_width}")
    if temporal == "motion" and motion != heads:
        problems.append(f"motion_num_attention_heads = {motion}, not {heads}")
    return heads, head_width


def unet_config(model: Denoiser) -> dict[str, Any]:
    """The `config.json` of diffusers for a U-Net of ours.

    Raises WeightsError for one that diffusers does not have.
    """
    network, signals = model.parts()[0], model.signals
    names = {temporal: (name, kind) for name, (temporal, kind) in CLASSES.items()}
    if network.temporal not in names or network.stem != (1, 1, 1) or "embeddings" not in signals:
        raise WeightsError(
            f"diffusers has no U-Net of model.temporal = {network.temporal!r}, stem = "
            f"{network.stem} and signals {', '.join(signals)}: it knows {', '.join(names)}, a stem "
            "of (1, 1, 1) and embeddings.")
    name, kind = names[network.temporal]
    levels = network.attention
    motion = network.temporal == "motion"
    heads = [network.dims()[1].split(width)[0] for width in network.widths]
    config = {
        "_class_name": name, "sample_size": None, "out_channels": network.channels,
        "in_channels": network.channels + signals.get("concat", {}).get("channels", 0),
        "down_block_types": [f"{'CrossAttn' * on}DownBlock{kind}" for on in levels],
        "up_block_types": [f"{'CrossAttn' * on}UpBlock{kind}" for on in levels[::-1]],
        "block_out_channels": list(network.widths), "layers_per_block": network.layers,
        "norm_num_groups": network.groups,
        "cross_attention_dim": signals["embeddings"]["features"],
        "num_attention_heads" if motion else "attention_head_dim":
            network.head_width if network.temporal == "3d" else _single(heads)}
    return config | ({"motion_num_attention_heads": network.heads,
                      "use_motion_mid_block": network.motion_middle} if motion else {})


def motion_config(model: Denoiser) -> dict[str, Any]:
    """The `config.json` of a MotionAdapter for the motion modules of a U-Net of ours."""
    config = unet_config(model)
    if config["_class_name"] != "UNetMotionModel":
        raise WeightsError("A MotionAdapter has motion modules: model.temporal = 'motion'.")
    return {"_class_name": ADAPTER, "block_out_channels": config["block_out_channels"],
            "motion_layers_per_block": config["layers_per_block"],
            "motion_norm_num_groups": config["norm_num_groups"],
            **{key: config[key] for key in ("motion_num_attention_heads", "use_motion_mid_block")}}


# In


# Names of AnimateDiff's own files of motion modules -> of diffusers, one after another.
ORIGINAL = (("module.", ""), (".temporal_transformer.", "."), (".attention_blocks.0.", ".attn1."),
            (".attention_blocks.1.", ".attn2."), (".norms.0.", ".norm1."),
            (".norms.1.", ".norm2."), (".ff_norm.", ".norm3."), (".pos_encoder.", ".pos_embed."))


@dataclasses.dataclass(frozen=True)
class Files:
    """A network in one or several folders. configs: class -> config; source: for load_params."""

    configs: Mapping[str, Mapping[str, Any]]
    source: Mapping[str, Stored]

    @property
    def base(self) -> Mapping[str, Any]:
        return next(config for name, config in self.configs.items() if name in CLASSES)

    @property
    def linear(self) -> bool:
        """Whether projections are matrices."""
        return all(len(stored.shape) == 2 for key, stored in self.source.items()
                   if re.search(r"attentions\.\d+\.proj_in\.weight", key))


def open_unet(paths: str | Path | Sequence[str | Path]) -> Files:
    """The U-Net in a folder of diffusers, and in further ones what is added to it: motion modules,
    also in AnimateDiff's own files. Reads headers only.

    Raises WeightsError for what is none, and for two of a kind.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    configs: dict[str, Mapping[str, Any]] = {}
    source: dict[str, Stored] = {}
    for path in map(Path, paths):
        arrays, given = open_weights(path), path / "config.json"
        if given.exists():
            config = read_json(given)
        elif any(".temporal_transformer." in key for key in arrays):
            config, arrays = {"_class_name": ADAPTER}, _of_diffusers(arrays)
        else:
            raise WeightsError(f"{path} has no config.json. Give the folder of a U-Net as "
                               "diffusers saves it (unet), or AnimateDiff's file of motion "
                               "modules.")
        name = str(config.get("_class_name"))
        if name not in CLASSES and name != ADAPTER:
            raise WeightsError(f"{path} is a {name}; U-Nets are made of {', '.join(CLASSES)} and "
                               f"{ADAPTER}.")
        if twice := sorted(set(arrays) & set(source)):
            raise WeightsError(listed(f"{path} and another of {', '.join(map(str, paths))} have "
                                      "the same arrays:", twice, most=3))
        configs[name] = config
        source |= arrays
    if sum(name in CLASSES for name in configs) != 1:
        raise WeightsError(f"{', '.join(map(str, paths))} should hold one of {', '.join(CLASSES)} "
                           f"and hold: {', '.join(configs)}.")
    return Files(configs, source)


def _of_diffusers(source: Mapping[str, Stored]) -> dict[str, Stored]:
    out = {}
    for key, stored in source.items():
        for old, new in ORIGINAL:
            key = key.replace(old, new)
        out[key] = stored
    return out


def load_unet(paths: str | Path | Sequence[str | Path], model: Denoiser, mesh: Mesh,
              dtype: str = "float32", trained: str | None = None) -> Params:
    """The parameters of `model` from files as `open_unet` reads them, on the mesh.

    dtype: of the kernels. trained: a regex of paths that stay float32; those of them that the
    files do not have are left out. `null`, the dropped text, is zero: no file has it. Raises
    WeightsError for files as `open_unet`, and for a model that is another network than theirs.
    """
    files = open_unet(paths)
    if wrong := _differences(model, files):
        raise WeightsError(listed(f"The model is not that of {paths}:", wrong))
    like = abstract_params(jax.eval_shape(model.new_params, jax.random.key(0)), mesh, dtype,
                           trained)
    return load_params(files.source, like, unet_rows(model, files.linear), trained)


def _differences(model: Denoiser, files: Files) -> list[str]:
    """What is another in the model than in the files, as far as arrays do not tell it."""
    backbone, signals = unet_from_config(files.base)
    here, there = model.parts()[0], Denoiser(backbone, signals).parts()[0]
    assert isinstance(here, UNet) and isinstance(there, UNet)
    names = ["channels", "widths", "layers", "attention", "groups", "stem"]
    if there.temporal != "none":
        names += ["temporal", "motion_middle"]
    wrong = [f"config.model.backbone: {name} = {getattr(here, name)}, but the weights have "
             f"{getattr(there, name)}" for name in names
             if getattr(here, name) != getattr(there, name)]
    (_, ours), (_, theirs) = here.dims(), there.dims()
    own = there.temporal != "none"
    for width in here.widths:
        for motion in (False, True) if own else (False,):
            if ours.split(width, motion) != theirs.split(width, motion):
                wrong.append(f"config.model.backbone: heads x width {ours.split(width, motion)} "
                             f"at width {width}, but the weights have "
                             f"{theirs.split(width, motion)}")
    adapter = files.configs.get(ADAPTER, {})
    wrong += [f"config.model.backbone.{name} = {getattr(here, name)}, but the motion adapter has "
              f"{adapter[key]}" for key, name in (("motion_num_attention_heads", "heads"),
                                                  ("motion_norm_num_groups", "groups"))
              if key in adapter and _single(adapter[key]) != getattr(here, name)]
    wrong += _unknown(adapter)
    text, needs = model.signals.get("embeddings", {}), signals["embeddings"]
    wrong += [f"config.model.signals.embeddings.{key} = {text.get(key)}, not {needs[key]}"
              for key in ("project", "length") if text.get(key) != needs[key]]
    return wrong


# Out


def save_unet(params: Params, model: Denoiser, path: str | Path, part: str = "unet",
              max_shard_bytes: int = 5_000_000_000) -> None:
    """A new folder that diffusers reads: of the whole network, or of a row of PARTS, for which
    `params` need not hold the rest.

    Raises WeightsError for a folder that is not empty, and a network that diffusers does not have.
    """
    pattern, config_of = PARTS[part]
    config, rows = config_of(model), unet_rows(model)
    kept = {name: leaf for name, leaf in flat(params).items() if re.search(pattern, name)}
    tree = unflatten_dict(kept, sep="/")
    plan = export_plan(tree, rows)
    places = {key.replace(".proj_in.weight", ".transformer_blocks.0.pos_embed.pe"): shape[0]
              for key, (shape, _) in plan.items()
              if ".motion_modules." in key and key.endswith(".proj_in.weight")}
    table = {key: ((1, FRAMES, width), np.dtype(np.float32)) for key, width in places.items()}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        yield from export(tree, rows)
        for key, width in places.items():
            yield key, np.asarray(frame_positions(FRAMES, width)).reshape(1, FRAMES, width)

    empty_folder(path)
    write_parts(path, "diffusion_pytorch_model", plan | table, arrays(), max_shard_bytes)
    write_json(Path(path) / "config.json", config)


FRAMES = 32      # whose positions diffusers keeps in its files; ours have no end
PARTS = {"unet": (r"^(network/(?!control/)|conditioning/embeddings/null)", unet_config),
         "motion": (r"^network/(?!control/).*/motion/", motion_config)}
