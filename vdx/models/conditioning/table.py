"""The table of signals."""

from collections.abc import Callable

import flax.linen as nn

from vdx.models.conditioning.control_signals import (
    Actions,
    Camera,
    Concat,
    Control,
    Depth,
    Flow,
    KnownFrames,
    Pose,
)
from vdx.models.conditioning.image_signals import ImageTokens, Reference
from vdx.models.conditioning.scalar_signals import Duration, FrameRate, FrameRateClass, Motion
from vdx.models.conditioning.text_signals import Embeddings, Text

SIGNALS: dict[str, Callable[..., nn.Module]] = {
    "text": Text,
    "embeddings": Embeddings,
    "image_tokens": ImageTokens,
    "concat": Concat,
    "control": Control,
    "known_frames": KnownFrames,
    "reference": Reference,
    "depth": Depth,
    "pose": Pose,
    "flow": Flow,
    "camera": Camera,
    "actions": Actions,
    "motion": Motion,
    "fps": FrameRate,
    "fps_class": FrameRateClass,
    "num_frames": Duration,
}
