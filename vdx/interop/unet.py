"""Pretrained U-Nets as those of vdx.models.unet.unet, and back.

They are of images, with motion modules, and 3D. References: `UNet2DConditionModel`,
`UNetMotionModel`, `UNet3DConditionModel` and `MotionAdapter` of diffusers. A network may be in
several folders, such as an image model and a motion adapter.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from vdx.files import write_json
from vdx.interop.animatediff import open_animatediff
from vdx.interop.config_ranges import read_config
from vdx.interop.keymap import WeightsError, export, flat, listed, slot_finder
from vdx.interop.load import abstract_params, load_params, open_weights
from vdx.interop.save import empty_folder, export_plan, write_shards
from vdx.interop.stored_array import StoredArray
from vdx.interop.unet_config import (
    ADAPTER,
    CLASSES,
    CONTROLS,
    FIELDS,
    control_config,
    control_from_config,
    motion_config,
    unet_config,
    unet_from_config,
)
from vdx.interop.unet_match import find_differences, motion_fields
from vdx.interop.unet_rows import CONTROL, unet_rows
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes
from vdx.models.unet.blocks import frame_positions
from vdx.types import Params

# Reading

# Entries of a network's config that a branch without a config of its own has as well.
INHERITED = ("norm_num_groups", "attention_head_dim", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class UNetFiles:
    """A network in one or several folders."""

    configs: Mapping[str, Mapping[str, Any]]  # class in diffusers -> its config
    source: Mapping[str, StoredArray]  # key of diffusers -> array, for load_params

    @property
    def base(self) -> Mapping[str, Any]:
        """The config of the whole network, without what is added to it."""
        return next(config for name, config in self.configs.items() if name in CLASSES)

    def denoiser_fields(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (backbone, signals) of the Denoiser that the files are of."""
        backbone, signals = unet_from_config(self.base)
        for name, config in self.configs.items():
            if name == ADAPTER:
                backbone |= {"temporal": "motion", **motion_fields(config)}
            elif name in CONTROLS:
                fields, signals["control"] = control_from_config(config)
                backbone |= fields
        return backbone, signals

    @property
    def has_control(self) -> bool:
        """True if a control branch is among the files."""
        return any(name in CONTROLS for name in self.configs)

    def has_linear_projections(self, prefix: str = "") -> bool:
        """Return whether the projections around attention in space are matrices.

        prefix: of the keys of one part of the network.
        """
        pattern = re.compile(prefix + r"\w+_block.*\.attentions\.\d+\.proj_in\.weight")
        return all(
            len(stored.shape) == 2 for key, stored in self.source.items() if pattern.match(key)
        )


def open_unet(paths: str | Path | Sequence[str | Path]) -> UNetFiles:
    """Open the U-Net in a folder of diffusers, and parts added in further ones.

    Those are motion modules, also in AnimateDiff's own files, and a control branch. Reads headers
    only. Raises WeightsError for a folder with none of these, and for two of a kind.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    names = ", ".join(map(str, paths))
    configs: dict[str, Mapping[str, Any]] = {}
    source: dict[str, StoredArray] = {}

    # No key is in two parts.
    for path in map(Path, paths):
        config, arrays = _open_part(path)
        repeated = sorted(set(arrays) & set(source))
        if repeated:
            head = f"{path} and another of {names} have the same arrays:"
            raise WeightsError(listed(head, repeated, most=3))
        configs[config["_class_name"]] = config
        source |= arrays

    # One of the parts is a whole network.
    if sum(name in CLASSES for name in configs) != 1:
        raise WeightsError(
            f"{names} should hold one of {', '.join(CLASSES)} and hold: {', '.join(configs)}."
        )
    files = UNetFiles(configs, source)

    # A branch without a config has the other sizes of the network.
    inherited = {key: files.base[key] for key in INHERITED if key in files.base}
    completed = {
        name: {**inherited, **config} if name in CONTROLS else config
        for name, config in configs.items()
    }
    return UNetFiles(completed, source)


def _open_part(path: Path) -> tuple[Mapping[str, Any], dict[str, StoredArray]]:
    """Return (config, arrays by diffusers' keys) of one folder or file."""
    arrays = open_weights(path)
    folder = path if path.is_dir() else path.parent

    has_config = (folder / "config.json").exists() and path.is_dir()
    made = None if has_config else open_animatediff(path, arrays)
    if made is not None:
        return made.config, _control_keys(made.config["_class_name"], made.arrays)
    if not (folder / "config.json").exists():
        raise WeightsError(
            f"{path} has no config.json. Give the folder of a U-Net as "
            "diffusers saves it (unet), or AnimateDiff's file of motion "
            "modules."
        )

    config = read_config(folder / "config.json", FIELDS)
    name = str(config.get("_class_name"))
    known = (*CLASSES, ADAPTER, *CONTROLS)
    if name not in known:
        raise WeightsError(f"{path} is a {name}; U-Nets are made of {', '.join(known)}.")

    return config, _control_keys(name, arrays)


def _control_keys(name: str, arrays: dict[str, StoredArray]) -> dict[str, StoredArray]:
    """Return arrays, those of a branch under keys of its own."""
    if name not in CONTROLS:
        return arrays
    return {f"{CONTROL}{key}": stored for key, stored in arrays.items()}


def load_unet(
    paths: str | Path | Sequence[str | Path],
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """Load the parameters of `model` onto the mesh.

    The files are read by `open_unet`. dtype: of the kernels. trained: a regex of paths that stay
    float32; those of them that the files do not have are left out. A control branch without files
    begins as a copy of the way down. `null`, the dropped text, is zero: no file has it. Raises
    WeightsError for files as `open_unet`, and for a model that is another network than theirs.
    """
    files = open_unet(paths)

    wrong = find_differences(model, files.configs, files.base)
    if wrong:
        raise WeightsError(listed(f"The model is not that of {paths}:", wrong))

    shapes = new_shapes(model)
    params = abstract_params(shapes, mesh, dtype, trained)

    linear = files.has_linear_projections()

    # The control branch comes from the files.
    if files.has_control:
        rows = unet_rows(model, linear, files.has_linear_projections(CONTROL))
        return load_params(files.source, params, rows, trained)

    # The control branch is a copy of the way down, under keys of its own.
    rows = unet_rows(model, linear, control_linear=linear)
    ours = flat(params)
    find_slot = slot_finder(rows)
    source = dict(files.source)
    for key, stored in files.source.items():
        slot = find_slot(CONTROL + key)
        if slot is not None and slot.path in ours:
            source[CONTROL + key] = stored
    return load_params(source, params, rows, trained)


# Writing

FRAMES = 32  # whose positions diffusers keeps in its files; ours have no end


class SavedPart(NamedTuple):
    """A part of a network that is a folder of its own."""

    pattern: str  # regex of the paths of its parameters
    config: Callable[[Denoiser], dict[str, Any]]  # its config.json


PARTS: dict[str, SavedPart] = {
    "unet": SavedPart(r"^(network/(?!control/)|conditioning/embeddings/null)", unet_config),
    "motion": SavedPart(r"^network/(?!control/).*/motion/", motion_config),
    "control": SavedPart(r"^network/control/", control_config),
}


def save_unet(
    params: Params,
    model: Denoiser,
    path: str | Path,
    part: str = "unet",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a new folder that diffusers reads.

    It has the whole network, or a row of PARTS. `params` need not have the other parts. Raises
    WeightsError for a folder that is not empty, and a network that diffusers does not have.
    """
    config = PARTS[part].config(model)
    rows = unet_rows(model)

    # The parameters of the part.
    pattern = re.compile(PARTS[part].pattern)
    kept = {name: leaf for name, leaf in flat(params).items() if pattern.search(name)}
    tree = unflatten_dict(kept, sep="/")

    # What is written: the arrays, then tables of positions that ours do not have.
    plan = {key.removeprefix(CONTROL): facts for key, facts in export_plan(tree, rows).items()}
    tables = {
        _position_key(key): width
        for key, ((width, *_), _) in plan.items()
        if ".motion_modules." in key and key.endswith(".proj_in.weight")
    }
    float32 = np.dtype(np.float32)
    table_plan = {key: ((1, FRAMES, width), float32) for key, width in tables.items()}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for key, value in export(tree, rows):
            yield key.removeprefix(CONTROL), value
        for key, width in tables.items():
            yield key, np.asarray(frame_positions(FRAMES, width)).reshape(1, FRAMES, width)

    empty_folder(path)
    write_shards(path, "diffusion_pytorch_model", plan | table_plan, arrays(), max_shard_bytes)
    write_json(Path(path) / "config.json", config)


def _position_key(key: str) -> str:
    """Return the key of a motion module's table of positions.

    key: of its first projection.
    """
    return key.replace(".proj_in.weight", ".transformer_blocks.0.pos_embed.pe")
