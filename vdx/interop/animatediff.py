"""AnimateDiff's own files: motion modules v1, v2 and v3, and SparseCtrl.

They have no config, other names than diffusers, and the positions of frames once per attention.
Some are wrapped in a dictionary. The makers normalise features otherwise than diffusers, see
`motion_config`. References: the repository guoyww/AnimateDiff, `animatediff/models` and
`configs/inference`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vdx.interop.keymap import WeightsError
from vdx.interop.stored_array import StoredArray

Arrays = Mapping[str, StoredArray]
MOTION = ".temporal_transformer."  # part of the keys of motion modules, in these files alone
POSITIONS = ".pos_encoder.pe"  # end of the keys of positions, which are computed
# Dictionaries around the network, and the prefix of a network that was trained on several devices.
WRAPPERS = ("state_dict.", "controlnet.")
PARALLEL = "module."
# Names in the files -> in diffusers, replaced one after another.
NAMES = (
    (MOTION, "."),
    (".attention_blocks.0.", ".attn1."),
    (".attention_blocks.1.", ".attn2."),
    (".norms.0.", ".norm1."),
    (".norms.1.", ".norm2."),
    (".ff_norm.", ".norm3."),
)
V1_POSITIONS = 24  # frames of a motion module v1; later ones have 32
LATENT_HINT = "controlnet_cond_embedding.weight"  # SparseCtrl on latents: one convolution
PIXEL_HINT = "controlnet_cond_embedding.conv_in.weight"  # on pixels: several
HINT_BLOCK = "controlnet_cond_embedding.blocks.{}.weight"
LORA = "_lora."  # part of the keys of motion LoRAs and of the domain adapter of v3


class OpenedFile(NamedTuple):
    """A file of AnimateDiff in diffusers' terms."""

    config: dict[str, Any]  # class in diffusers, and what the arrays show
    arrays: dict[str, StoredArray]  # by diffusers' keys


def open_animatediff(path: Path, source: Arrays) -> OpenedFile | None:
    """Return what a file of AnimateDiff holds, or None for arrays of anything else.

    Raises WeightsError for its LoRA files.
    """
    arrays = _unwrapped(source)
    if any(LORA in key for key in arrays):
        raise WeightsError(
            f"{path} is a LoRA of an image U-Net or of motion modules (a camera motion of v2, the "
            "domain adapter of v3); vdx reads whole motion modules and SparseCtrl."
        )
    if not any(MOTION in key for key in arrays):
        return None

    config = motion_config(arrays)
    if LATENT_HINT in arrays or PIXEL_HINT in arrays:
        config = sparse_config(arrays)
    named = {
        _diffusers_name(key): stored
        for key, stored in arrays.items()
        if not key.endswith(POSITIONS)
    }
    return OpenedFile(config, named)


def _unwrapped(source: Arrays) -> dict[str, StoredArray]:
    """Return the arrays of the network inside the dictionaries of a file."""
    arrays = dict(source)
    for prefix in (*WRAPPERS, PARALLEL):
        inside = {key: stored for key, stored in arrays.items() if key.startswith(prefix)}
        if inside:
            arrays = {key.removeprefix(prefix): stored for key, stored in inside.items()}
    return arrays


def _diffusers_name(key: str) -> str:
    for old, new in NAMES:
        key = key.replace(old, new)
    return key


def motion_config(arrays: Arrays) -> dict[str, Any]:
    """Return the config of motion modules, as far as the arrays show it.

    The entries that begin with an underscore are fields of our UNet, which diffusers does not have.
    The makers normalise each frame by itself in motion modules. With v1 alone they normalise all
    frames of a clip at once in the residuals and before the last convolution
    (`use_inflated_groupnorm: false`). v2 has a module in the middle; v1 has fewer positions.
    """
    middle = any(key.startswith("mid_block.") for key in arrays)
    config = {
        "_class_name": "MotionAdapter",
        "use_motion_mid_block": middle,
        "_joint_norm": False,
    }
    frames = {stored.shape[-2] for key, stored in arrays.items() if key.endswith(POSITIONS)}
    if middle or frames:
        config["_joint_residual_norm"] = not middle and frames == {V1_POSITIONS}
    return config


def sparse_config(arrays: Arrays) -> dict[str, Any]:
    """Return the config of a SparseCtrl, as far as the arrays show it.

    It has the other sizes of the U-Net that it belongs to.
    """
    latents = LATENT_HINT in arrays
    first = arrays[LATENT_HINT if latents else PIXEL_HINT]
    config = {
        "_class_name": "SparseControlNetModel",
        "conditioning_channels": first.shape[1] - 1,  # without the mask
        "concat_conditioning_mask": True,
        "use_simplified_condition_embedding": latents,
        "_joint_norm": False,
    }
    if not latents:
        # Every second convolution changes the number of channels.
        widths = [first.shape[0]]
        while (key := HINT_BLOCK.format(2 * len(widths) - 1)) in arrays:
            widths.append(arrays[key].shape[0])
        config["conditioning_embedding_out_channels"] = widths
    return config
