"""The table of mixers, and names for patterns of them.

A mixer lets the tokens of a clip exchange data (see `Mixer` in context.py). The transformer's
`pattern` names rows of MIXERS.
"""

from collections.abc import Callable, Mapping
from typing import Any

from vdx.models.mixers.context import Mixer
from vdx.models.mixers.conv import ConvMixer
from vdx.models.mixers.grid_attention import GridAttention, SpaceAttention
from vdx.models.mixers.no_exchange import NoExchange
from vdx.models.mixers.recurrent import Recurrent
from vdx.models.mixers.time_attention import TimeAttention

MIXERS: dict[str, Callable[..., Mixer]] = {
    "full": GridAttention,
    "space": SpaceAttention,
    "time": TimeAttention,
    "conv": ConvMixer,
    "recurrent": Recurrent,
    "none": NoExchange,
}

# Patterns by name. A config may also write a pattern out, with names or specs
# {"name": row of MIXERS, **fields}, e.g. ("space", "full", {"name": "time", "block": 1}).
PATTERNS: dict[str, tuple[str | Mapping[str, Any], ...]] = {
    "full": ("full",),
    # Space within a frame, then time at a place (Latte, VDM).
    "factorized": ("space", "time"),
    "factorized_causal": ("space", {"name": "time", "block": 1}),
    "conv": ("space", {"name": "conv", "kernel": (3, 1, 1)}),
    "recurrent": ("space", "recurrent"),
    # The transformer's `sincos` adds Latte's positions to the tokens.
    "latte": (
        {"name": "space", "positions": "none", "qk_norm": False},
        {"name": "time", "positions": "none", "qk_norm": False},
    ),
    # Independent frames.
    "frames": ("space", "none"),
}
