"""Animated images (GIF, WebP, APNG, AVIF) as frames with durations of their own."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from vdx.data.images import ImageFile, is_animated, load, open_image_file, to_rgb

__all__ = ["AnimationFrame", "is_animation", "iter_animation"]

# Browsers show frames of at most 10 ms for 100 ms: many tools write such durations without
# meaning them (WebKit, Blink and Gecko share the rule).
SHORTEST = 0.011  # seconds
DEFAULT = 0.1  # seconds


class AnimationFrame(NamedTuple):
    """One frame of an animation."""

    pixels: np.ndarray  # uint8 [h w 3]
    seconds: float  # how long it is on the screen


def is_animation(file: ImageFile) -> bool:
    """Return whether a file is an image of several frames. Raises ValueError for no image."""
    with open_image_file(file) as image:
        return is_animated(image)


def iter_animation(file: ImageFile) -> Iterator[AnimationFrame]:
    """Yield the frames of an animated image in order; memory holds one at a time.

    A still image is a single frame. The loop count is left out: each frame comes once. Raises
    ValueError, at the first frame or when the damage is reached, for files that are no image,
    too large, damaged or truncated.
    """
    with open_image_file(file) as image:
        # The default image of an APNG may be one that no animation shows.
        first = int(getattr(image, "default_image", False))
        numbers = itertools.count(first) if is_animated(image) else (first,)
        for number in numbers:
            if not _seek(image, number):
                return
            load(image)
            yield AnimationFrame(to_rgb(image), _duration(image))


def _seek(image: Image.Image, number: int) -> bool:
    """Move to a frame; return whether there is one. Raises ValueError for truncated files."""
    try:
        image.seek(number)
        return True
    except EOFError:
        pass
    except Exception as error:  # there is no list of what decoders raise on damaged files
        raise ValueError(f"damaged in frame {number}: {error}") from error

    frames = getattr(image, "n_frames", 1)
    if number < frames:
        raise ValueError(f"truncated: {number} of {frames} frames are there")
    return False


def _duration(image: Image.Image) -> float:
    """Return the seconds that browsers show the current frame."""
    seconds = image.info.get("duration", 0) / 1000
    if seconds < SHORTEST:
        return DEFAULT
    return float(seconds)
