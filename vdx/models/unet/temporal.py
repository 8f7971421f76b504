"""Temporal parts of a U-Net: which layers connect the frames of a clip."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vdx.config.build import build, lookup
from vdx.models.mixers.table import MIXERS


@dataclasses.dataclass(frozen=True)
class Temporal:
    """The layers between the frames of a U-Net."""

    motion: bool = True  # motion modules, after the image layers
    everywhere: bool = True  # motion modules also at levels without attention
    positions: bool = True  # frames have positions in the motion modules
    attentions: int = 2  # in a motion module, one after another
    # A convolution in time after every residual, and a motion module before the first level.
    convs: bool = False
    mixer: Mapping[str, Any] | None = None  # a row of MIXERS with its fields, for attention

    def has_motion(self, attention: bool) -> bool:
        """Return whether a level has motion modules.

        attention: the level has attention.
        """
        return self.motion and (attention or self.everywhere)


def temporal_of(spec: str | Mapping[str, Any]) -> Temporal:
    """Return the temporal part that a config names.

    That is a row of TEMPORAL, or motion modules around a mixer, a row of MIXERS with its fields.
    Raises ConfigError for unknown names and fields.
    """
    if isinstance(spec, str):
        return lookup(spec, TEMPORAL, "model.temporal")
    # Built once here, so that a wrong spec raises before the network is traced.
    build(spec, MIXERS, "model.temporal", heads=1, dtype=jnp.float32, parent=None)
    return Temporal(positions=False, mixer=spec)


TEMPORAL: dict[str, Temporal] = {
    "none": Temporal(motion=False),
    "motion": Temporal(),  # AnimateDiff
    "3d": Temporal(everywhere=False, positions=False, convs=True),  # ModelScope
}
