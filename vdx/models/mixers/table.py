"""The table of mixers."""

from collections.abc import Callable
from typing import Any

from vdx.models.mixers.conv import ConvMixer
from vdx.models.mixers.grid_attention import GridAttention, SpaceAttention
from vdx.models.mixers.no_exchange import NoExchange
from vdx.models.mixers.recurrent import Recurrent
from vdx.models.mixers.time_attention import TimeAttention

MIXERS: dict[str, Callable[..., Any]] = {
    "full": GridAttention,
    "space": SpaceAttention,
    "time": TimeAttention,
    "conv": ConvMixer,
    "recurrent": Recurrent,
    "none": NoExchange,
}


# Names for block patterns; a config may also spell a pattern out, with names or specs
# {"name": row of MIXERS, **fields}, e.g. ("space", "full", {"name": "time", "block": 1}).
PATTERNS: dict[str, tuple[str | dict[str, Any], ...]] = {
    "full": ("full",),
    "factorized": ("space", "time"),  # Latte, VDM: space within a frame, then time at a place
    "factorized_causal": ("space", {"name": "time", "block": 1}),
    "conv": ("space", {"name": "conv", "kernel": (3, 1, 1)}),
    "recurrent": ("space", "recurrent"),
    "latte": tuple(
        {"name": name, "positions": "none", "qk_norm": False} for name in ("space", "time")
    ),  # its `sincos` positions are added
    "frames": ("space", "none"),  # independent frames
}
