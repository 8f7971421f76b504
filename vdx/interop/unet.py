"""Public U-Nets as those of vdx.models.unet.unet, and back: of images, with motion modules, 3D.

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
from vdx.interop.keymap import (
    CONV,
    KEEP,
    LINEAR,
    Row,
    WeightsError,
    export,
    flat,
    listed,
    patches,
    slot_finder,
)
from vdx.interop.load import abstract_params, load_params, open_weights
from vdx.interop.save import empty_folder, export_plan, write_shards
from vdx.interop.stored_array import StoredArray
from vdx.interop.unet_config import (
    ADAPTER,
    CLASSES,
    CONTROLS,
    control_config,
    control_from_config,
    motion_config,
    single,
    unet_config,
    unet_from_config,
    unknown,
)
from vdx.interop.vae import dense_rows, norm_rows, residual_rows
from vdx.models.conditioning.signals import NULL
from vdx.models.denoiser import Denoiser
from vdx.models.unet.blocks import frame_positions
from vdx.models.unet.unet import UNet
from vdx.types import Params

# The arrays


def _attention(theirs: str, ours: str) -> Iterator[Row]:
    for name in "qkv":
        yield Row(f"{theirs}.to_{name}.weight", f"{ours}/{name}/kernel", LINEAR)
    yield from dense_rows(f"{theirs}.to_out.0", f"{ours}/out", LINEAR)


def _exchange(theirs: str, ours: str, linear: bool) -> Iterator[Row]:
    """`Transformer2DModel`, `TransformerTemporalModel` or a motion module, of one layer."""
    yield from norm_rows(f"{theirs}.norm", f"{ours}/norm")
    for name in ("proj_in", "proj_out"):
        yield from dense_rows(
            f"{theirs}.{name}", f"{ours}/{name}", LINEAR if linear else patches((1, 1))
        )
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
        yield from dense_rows(
            f"{theirs}.conv{i + 1}.{3 if i else 2}", f"{ours}/conv_{i}", patches((3, 1, 1))
        )


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
    yield from _layers(
        f"{theirs}down_blocks.{{i}}", "{j}", f"{ours}/down_{{i}}_{{j}}", linear, motion
    )
    yield from _layers(f"{theirs}mid_block", "{j}", f"{ours}/middle_{{j}}", linear, motion)
    yield from dense_rows(
        f"{theirs}down_blocks.{{i}}.downsamplers.0.conv", f"{ours}/down_{{i}}_conv", CONV
    )


def unet_rows(
    model: Denoiser, linear: bool | None = None, control_linear: bool = False
) -> list[Row]:
    """From the keys of diffusers, those of a control branch after "control.", to our parameters.

    linear: whether the projections around attention in space are matrices or convolutions; by
    default as the public models have it. `null`, the dropped text, is not in the files, and zero
    until it is given.
    """
    network = model.backbone
    temporal = network.dims()[1].temporal
    linear = temporal.convs if linear is None else linear
    motion = "temp_attentions" if temporal.convs else "motion_modules"
    return [
        *encoder_rows("", "network/encoder", linear, motion),
        *_layers("up_blocks.{i}", "{j}", "network/up_{i}_{j}", linear, motion),
        *dense_rows("up_blocks.{i}.upsamplers.0.conv", "network/up_{i}_conv", CONV),
        *norm_rows("conv_norm_out", "network/norm_out"),
        *dense_rows("conv_out", "network/conv_out", CONV),
        Row("", NULL),
        *_control_rows(bool(network.hint), control_linear),
    ]


def _control_rows(deep: bool, linear: bool) -> Iterator[Row]:
    """A control branch; deep: whether its maps pass several convolutions."""
    theirs, ours = "control.controlnet_", "network/control"
    yield from encoder_rows("control.", f"{ours}/encoder", linear, "motion_modules")
    if deep:
        for name, other in (("conv_in",) * 2, ("conv_out",) * 2, ("blocks.{i}", "conv_{i}")):
            yield from dense_rows(f"{theirs}cond_embedding.{name}", f"{ours}/hint/{other}", CONV)
    else:
        yield from dense_rows(f"{theirs}cond_embedding", f"{ours}/hint/conv_in", CONV)
    for name, other in (("down_blocks.{i}", "out_{i}"), ("mid_block", "out_middle")):
        yield from dense_rows(f"{theirs}{name}", f"{ours}/{other}", patches((1, 1)))


# In


# Names of AnimateDiff's own files of motion modules -> of diffusers, one after another.
ORIGINAL = (
    ("module.", ""),
    (".temporal_transformer.", "."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
    (".pos_encoder.", ".pos_embed."),
)


@dataclasses.dataclass(frozen=True)
class Files:
    """A network in one or several folders. configs: class -> config; source: for load_params."""

    configs: Mapping[str, Mapping[str, Any]]
    source: Mapping[str, StoredArray]

    @property
    def base(self) -> Mapping[str, Any]:
        return next(config for name, config in self.configs.items() if name in CLASSES)

    def linear(self, prefix: str = "") -> bool:
        """Whether projections are matrices, in the part whose keys begin so."""
        return all(
            len(stored.shape) == 2
            for key, stored in self.source.items()
            if re.match(prefix + r"\w+_block.*\.attentions\.\d+\.proj_in\.weight", key)
        )


def open_unet(paths: str | Path | Sequence[str | Path]) -> Files:
    """The U-Net in a folder of diffusers, and in further ones what is added to it: motion modules,
    also in AnimateDiff's own files, and a control branch, whose keys here begin with "control.".
    Reads headers only.

    Raises WeightsError for what is none, and for two of a kind.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    configs: dict[str, Mapping[str, Any]] = {}
    source: dict[str, StoredArray] = {}
    for path in map(Path, paths):
        arrays, given = open_weights(path), (path if path.is_dir() else path.parent) / "config.json"
        if any(".temporal_transformer." in key for key in arrays):
            config, arrays = {"_class_name": ADAPTER}, _of_diffusers(arrays)
        elif given.exists():
            config = read_json(given)
        else:
            raise WeightsError(
                f"{path} has no config.json. Give the folder of a U-Net as "
                "diffusers saves it (unet), or AnimateDiff's file of motion "
                "modules."
            )
        name = str(config.get("_class_name"))
        if name not in (known := (*CLASSES, ADAPTER, *CONTROLS)):
            raise WeightsError(f"{path} is a {name}; U-Nets are made of {', '.join(known)}.")
        if name in CONTROLS:
            arrays = {f"control.{key}": stored for key, stored in arrays.items()}
        if twice := sorted(set(arrays) & set(source)):
            raise WeightsError(
                listed(
                    f"{path} and another of {', '.join(map(str, paths))} have the same arrays:",
                    twice,
                    most=3,
                )
            )
        configs[name] = config
        source |= arrays
    if sum(name in CLASSES for name in configs) != 1:
        raise WeightsError(
            f"{', '.join(map(str, paths))} should hold one of {', '.join(CLASSES)} "
            f"and hold: {', '.join(configs)}."
        )
    return Files(configs, source)


def _of_diffusers(source: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    out = {}
    for key, stored in source.items():
        for old, new in ORIGINAL:
            key = key.replace(old, new)
        out[key] = stored
    return out


def load_unet(
    paths: str | Path | Sequence[str | Path],
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """The parameters of `model` from files as `open_unet` reads them, on the mesh.

    dtype: of the kernels. trained: a regex of paths that stay float32; those of them that the
    files do not have are left out. A control branch without files begins as a copy of the way
    down. `null`, the dropped text, is zero: no file has it. Raises WeightsError for files as
    `open_unet`, and for a model that is another network than theirs.
    """
    files = open_unet(paths)
    if wrong := _differences(model, files):
        raise WeightsError(listed(f"The model is not that of {paths}:", wrong))
    like = abstract_params(
        jax.eval_shape(model.new_params, jax.random.key(0)), mesh, dtype, trained
    )
    source, linear = dict(files.source), files.linear()
    branch = set(CONTROLS) & set(files.configs)
    rows = unet_rows(model, linear, files.linear("control.") if branch else linear)
    if not branch:
        place, ours = slot_finder(rows), flat(like)
        source |= {
            f"control.{key}": stored
            for key, stored in files.source.items()
            if (found := place(f"control.{key}")) and found.path in ours
        }
    return load_params(source, like, rows, trained)


def _differences(model: Denoiser, files: Files) -> list[str]:
    """What is another in the model than in the files, as far as arrays do not tell it."""
    backbone, signals = unet_from_config(files.base)
    here, there = model.backbone, Denoiser(backbone, signals).backbone
    assert isinstance(here, UNet) and isinstance(there, UNet)
    names = ["channels", "widths", "layers", "attention", "groups", "stem"]
    if there.temporal != "none":
        names += ["temporal", "motion_middle"]
    wrong = [
        f"config.model.backbone: {name} = {getattr(here, name)}, but the weights have "
        f"{getattr(there, name)}"
        for name in names
        if getattr(here, name) != getattr(there, name)
    ]
    (_, ours), (_, theirs) = here.dims(), there.dims()
    own = there.temporal != "none"
    for width in here.widths:
        for motion in (False, True) if own else (False,):
            if ours.split(width, motion) != theirs.split(width, motion):
                wrong.append(
                    f"config.model.backbone: heads x width {ours.split(width, motion)} "
                    f"at width {width}, but the weights have "
                    f"{theirs.split(width, motion)}"
                )
    adapter = files.configs.get(ADAPTER, {})
    wrong += [
        f"config.model.backbone.{name} = {getattr(here, name)}, but the motion adapter has "
        f"{adapter[key]}"
        for key, name in (
            ("motion_num_attention_heads", "heads"),
            ("motion_norm_num_groups", "groups"),
        )
        if key in adapter and single(adapter[key]) != getattr(here, name)
    ]
    wrong += unknown(adapter) + _control_differences(model, files)
    text, needs = model.signals.get("embeddings", {}), signals["embeddings"]
    wrong += [
        f"config.model.signals.embeddings.{key} = {text.get(key)}, not {needs[key]}"
        for key in ("project", "length")
        if text.get(key) != needs[key]
    ]
    return wrong


def _control_differences(model: Denoiser, files: Files) -> list[str]:
    here, wrong = model.backbone, []
    for name in set(CONTROLS) & set(files.configs):
        config = files.configs[name]
        fields, signal = control_from_config(config)
        fields["groups"] = config.get("norm_num_groups", 32)
        wrong += [
            f"config.model.backbone: {field} = {getattr(here, field)}, but the weights of "
            f"the {name} have {value}"
            for field, value in fields.items()
            if getattr(here, field) != value
        ]
        said = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        heads = [here.dims()[1].split(width)[0] for width in here.widths]
        if single(said) != single(heads):
            wrong.append(
                f"config.model.backbone: heads = {single(heads)}, but the {name} has {single(said)}"
            )
        if (
            "motion_num_attention_heads" in config
            and single(config["motion_num_attention_heads"]) != here.heads
        ):
            wrong.append(
                f"config.model.backbone: heads = {here.heads}, but the {name} has "
                f"motion_num_attention_heads = {config['motion_num_attention_heads']}"
            )
        ours = model.signals.get("control", {})
        wrong += [
            f"config.model.signals.control.{key} = {ours.get(key)}, not {value}"
            for key, value in signal.items()
            if ours.get(key, 1) != value
        ]
        wrong += unknown(config)
    return wrong


# Out


def save_unet(
    params: Params,
    model: Denoiser,
    path: str | Path,
    part: str = "unet",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A new folder that diffusers reads: of the whole network, or of a row of PARTS, for which
    `params` need not hold the rest.

    Raises WeightsError for a folder that is not empty, and a network that diffusers does not have.
    """
    pattern, config_of = PARTS[part]
    config, rows = config_of(model), unet_rows(model)
    kept = {name: leaf for name, leaf in flat(params).items() if re.search(pattern, name)}
    tree = unflatten_dict(kept, sep="/")
    plan = {key.removeprefix("control."): facts for key, facts in export_plan(tree, rows).items()}
    places = {
        key.replace(".proj_in.weight", ".transformer_blocks.0.pos_embed.pe"): shape[0]
        for key, (shape, _) in plan.items()
        if ".motion_modules." in key and key.endswith(".proj_in.weight")
    }
    table = {key: ((1, FRAMES, width), np.dtype(np.float32)) for key, width in places.items()}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        yield from ((key.removeprefix("control."), value) for key, value in export(tree, rows))
        for key, width in places.items():
            yield key, np.asarray(frame_positions(FRAMES, width)).reshape(1, FRAMES, width)

    empty_folder(path)
    write_shards(path, "diffusion_pytorch_model", plan | table, arrays(), max_shard_bytes)
    write_json(Path(path) / "config.json", config)


FRAMES = 32  # whose positions diffusers keeps in its files; ours have no end
PARTS = {
    "unet": (r"^(network/(?!control/)|conditioning/embeddings/null)", unet_config),
    "motion": (r"^network/(?!control/).*/motion/", motion_config),
    "control": (r"^network/control/", control_config),
}
