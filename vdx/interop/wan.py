"""Wan transformers in files: opened, checked, and loaded into our transformer.

Wan 2.1, 2.2 and VACE, and models trained from them to generate clips block by block: SkyReels-V2,
CausVid, Self-Forcing. The files may have the layout of diffusers, of the original repositories
Wan-Video/Wan2.1 and Wan2.2, or of ComfyUI.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vdx.interop.config_ranges import read_config
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.load import load_model, open_weights
from vdx.interop.stored_array import StoredArray
from vdx.interop.wan_config import FIELDS, FIXED, wan_config, wan_from_config
from vdx.interop.wan_keys import diffusers_names, wan_transformer_rows
from vdx.models.denoiser import Denoiser
from vdx.types import Params

HEAD_WIDTH = 128  # of every published model
# Fields of a config on which no array depends.
UNSEEN = {"_class_name", "rope_max_seq_len", "vace_layers", *FIXED}


@dataclasses.dataclass(frozen=True)
class Wan:
    """A Wan transformer in files."""

    config: dict[str, Any]  # the config.json of diffusers
    source: dict[str, StoredArray]  # its arrays by the keys of diffusers, for load_params
    backbone: dict[str, Any]  # a field of the Denoiser that it is
    signals: dict[str, Any]  # the other one


def open_wan(path: str | Path) -> Wan:
    """Open the Wan transformer in a file or folder, in any of its layouts.

    Reads headers only. Raises WeightsError for arrays of another network, and for a `config.json`
    that disagrees with the weights.
    """
    source = diffusers_names(open_weights(path))
    config_file = Path(path) / "config.json"
    given: dict[str, Any] = {}
    if config_file.exists():
        given = read_config(config_file, FIELDS)
    if "attention_head_dim" not in given:  # the original's config has other names
        given = {}

    # The config that follows from the arrays. The given one must agree with it.
    shapes = {key: stored.shape for key, stored in source.items()}
    found = wan_config(shapes, given.get("attention_head_dim", HEAD_WIDTH))
    wrong = [
        f"{key} = {given[key]!r}, but the weights have {value!r}"
        for key, value in found.items()
        if key in given and given[key] != value and key not in UNSEEN
    ]
    if wrong:
        raise WeightsError(listed(f"{config_file} disagrees with the weights next to it:", wrong))

    config = found | given
    backbone, signals = wan_from_config(config)
    return Wan(config, source, backbone, signals)


def load_wan(
    path: str | Path,
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """Return the parameters of `model` from a Wan transformer, on the mesh.

    path: a file or folder. dtype, trained: see `load_model`, also for a model that attends
    blockwise. `null`, the dropped text, is zero: no file has it. Raises WeightsError for files as
    `open_wan` does, and for a model that is another network than theirs.
    """
    wan = open_wan(path)
    theirs = Denoiser(wan.backbone, wan.signals)
    rows = wan_transformer_rows(model)
    return load_model(model, theirs, wan.source, rows, path, mesh, dtype, trained)
