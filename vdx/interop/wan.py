"""Wan 2.1, 2.2 and VACE, and what is trained from them to make clips block by block (SkyReels-V2,
CausVid, Self-Forcing): their configurations and their weights as those of our transformer.

References: `WanTransformer3DModel`, `WanVACETransformer3DModel` and `SkyReelsV2Transformer3DModel`
of diffusers, and the original repositories Wan-Video/Wan2.1 and Wan2.2, whose files (ComfyUI's,
CausVid's and Self-Forcing's too) name the same arrays in another way. One table holds all three
names of every layer: the original's become those of diffusers when a file is opened, and those
ours by rows.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vdx.files import read_json
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.load import load_model, open_weights
from vdx.interop.stored_array import StoredArray
from vdx.interop.wan_config import FIXED, wan_config, wan_from_config
from vdx.interop.wan_keys import diffusers_names, wan_transformer_rows
from vdx.models.denoiser import Denoiser
from vdx.types import Params

HEAD_WIDTH = 128  # of every public model
# What the weights do not tell.
UNSEEN = {"_class_name", "rope_max_seq_len", "vace_layers", *FIXED}


@dataclasses.dataclass(frozen=True)
class Wan:
    """A Wan transformer in files: `config` as diffusers has it, `source` for load_params, and
    the fields of the Denoiser that it is."""

    config: dict[str, Any]
    source: dict[str, StoredArray]
    backbone: dict[str, Any]
    signals: dict[str, Any]


def open_wan(path: str | Path) -> Wan:
    """The Wan transformer in a file or folder, in the layout of diffusers, of the original
    repositories or of ComfyUI. Reads headers only.

    Raises WeightsError for what is not one, and for a `config.json` that disagrees with the
    weights.
    """
    source = diffusers_names(open_weights(path))
    given = Path(path) / "config.json"
    said = read_json(given) if given.exists() else {}
    if "attention_head_dim" not in said:  # the original's config has other names
        said = {}
    config = wan_config(
        {key: stored.shape for key, stored in source.items()},
        said.get("attention_head_dim", HEAD_WIDTH),
    )
    wrong = [
        f"{key} = {said[key]!r}, but the weights have {value!r}"
        for key, value in config.items()
        if key in said and said[key] != value and key not in UNSEEN
    ]
    if wrong:
        raise WeightsError(listed(f"{given} disagrees with the weights beside it:", wrong))
    return Wan(config | said, source, *wan_from_config(config | said))


def load_wan(
    path: str | Path,
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """The parameters of `model` from a Wan transformer in a file or folder, on the mesh.

    dtype, trained: as of `load_model`. `null`, the dropped text, is zero: no file has it. The
    blocks of the model's pattern may be others than theirs, or none: weights know nothing of them.
    Raises
    WeightsError for files as `open_wan`, and for a model that is another network than theirs.
    """
    wan = open_wan(path)
    return load_model(
        model,
        Denoiser(wan.backbone, wan.signals),
        wan.source,
        wan_transformer_rows(model),
        path,
        mesh,
        dtype,
        trained,
    )
