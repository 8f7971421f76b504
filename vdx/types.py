"""Shared names: array aliases, the batch, the conditioning ports.

Axis letters are the same everywhere: b batch, t frames, h w space, c channels, d features,
n heads, l text length, s any flattened sequence. Arrays are channels-last.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import numpy as np
from jax.typing import DTypeLike  # "bfloat16", jnp.bfloat16 or a np.dtype
from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray, UInt8

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
    "Key",
    "PRNGKeyArray",
    "Params",
    "Ports",
    "UInt8",
]

# A batch is a flat dict whose arrays share the leading axis b:
#   video         uint8    [b t h w 3]  pixels, or
#   latents       float    [b t h w c]  cached latents, already normalised
#   text          int32    [b l]        token ids, or float [b l d] cached embeddings
#   text_mask     bool     [b l]        True on real tokens
#   image_tokens  float    [b m d]      features of images from a frozen encoder
#   concat        float    [b t h w c]  channels that are concatenated to the noisy clip
#   control       float    [b t h w c]  input of the control blocks; it may be larger than x0
#   known         float    [b t h w c]  frames that are given, zero elsewhere
#   known_mask    float    [b t]        1 on the frames that are given
#   reference     uint8    [b h w 3]    an image of the content that the clip must show
#   depth, pose, flow, camera  [b t h w k], actions [b t], motion [b]:
#                                       see vdx/models/conditioning/control_signals.py
#   fps           float32  [b]          frames per second of this clip
#   num_frames    int32    [b]          pixel frames in this clip
Batch = Mapping[str, Array]
Params = Mapping[str, Any]


class Ports(flax.struct.PyTreeNode):
    """The places where conditioning enters a network. A port that is None is not used."""

    tokens: Array | None = None  # float [b l d], read by cross-attention
    tokens_mask: Array | None = None  # bool [b l], True on visible tokens; None: all are visible
    image_tokens: Array | None = None  # float [b m d], read by a second cross-attention
    # float [b d], or [b t d] with one vector a frame: added to the time embedding, and so to
    # every modulation.
    vector: Array | None = None
    # float [b 6 d]: added to the modulation of every block, but not to that of the head.
    modulation: Array | None = None
    concat: Array | None = None  # float [b t h w c], concatenated to the noisy clip's channels
    add: Array | None = None  # float [b t h w d], control residuals, added to the patch embeddings
    # float [b t h w c], read by the control blocks; their hints are added after some layers.
    control: Array | None = None
    control_scale: Array | None = None  # float [b], multiplies the hints
