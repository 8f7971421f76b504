"""The table of conditioning signals."""

from collections.abc import Callable

from vdx.models.conditioning.base import Signal
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

SIGNALS: dict[str, Callable[..., Signal]] = {
    # Text.
    "text": Text,
    "embeddings": Embeddings,
    # Images.
    "image_tokens": ImageTokens,
    "reference": Reference,
    # Frames.
    "known_frames": KnownFrames,
    "concat": Concat,
    "control": Control,
    "depth": Depth,
    "pose": Pose,
    "flow": Flow,
    "camera": Camera,
    "actions": Actions,
    # Numbers.
    "motion": Motion,
    "fps": FrameRate,
    "fps_class": FrameRateClass,
    "num_frames": Duration,
}
