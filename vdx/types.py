"""Names that every module shares: array aliases, the batch, the conditioning ports.

Axis letters, everywhere: b batch, t frames, h w space, c channels, d features, n heads,
l text length, s any flattened sequence. Arrays are channels-last.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import numpy as np
from jax.typing import DTypeLike  # "bfloat16", jnp.bfloat16 or a np.dtype
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt8

if TYPE_CHECKING:
    from jax import Array
else:
    Array = jax.Array | np.ndarray  # a network takes both; mypy sees the one with `.at`

__all__ = [
    "Array",
    "Batch",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "PRNGKeyArray",
    "Params",
    "Ports",
    "UInt8",
]

# A batch is a flat dict whose arrays share the leading axis b:
#   video      uint8  [b t h w 3]   pixels, or
#   latents    float  [b t h w c]   cached latents, already normalised
#   text       int32  [b l]         token ids, or float [b l d] cached embeddings
#   text_mask  bool   [b l]         True on real tokens
#   image_tokens float [b m d]      features of images from a frozen encoder
#   concat     float  [b t h w c]   channels to lie beside the noisy clip
#   control    float  [b t h w c]   what a network's control blocks read, perhaps larger than x0
#   known, known_mask  [b t h w c], [b t]   frames that are given, and which
#   reference  uint8  [b h w 3]     a picture of what the clip is to show
#   depth, pose, flow, camera  [b t h w k], actions [b t], motion [b]: see vdx/models/conditioning/control_signals.py
#   fps        float32 [b]          frames per second of this clip
#   num_frames int32  [b]           pixel frames in this clip
Batch = Mapping[str, Array]
Params = Mapping[str, Any]


class Ports(flax.struct.PyTreeNode):
    """Where conditioning enters a network. A port that is None is not used.

    tokens: float [b l d], read by cross-attention; tokens_mask: bool [b l], None if all are seen.
    image_tokens: float [b m d], read by a cross-attention of their own beside that of `tokens`.
    vector: float [b d] or, one for each frame, [b t d]; added to the time embedding and so to
    every modulation. modulation: float [b 6 d], added to that of every block, not of the end.
    concat: float [b t h w c], concatenated to the noisy input's channels.
    add:    float [b t h w d], added to the patch embeddings (control residuals).
    control: float [b t h w c], read by control blocks, whose hints are added to the tokens after
    some layers, multiplied by control_scale: float [b].
    """

    tokens: Array | None = None
    tokens_mask: Array | None = None
    image_tokens: Array | None = None
    vector: Array | None = None
    modulation: Array | None = None
    concat: Array | None = None
    add: Array | None = None
    control: Array | None = None
    control_scale: Array | None = None
