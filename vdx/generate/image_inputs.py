"""Images, videos and masks from files, as pretrained models read them."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

from vdx.config.build import ConfigError
from vdx.data.images import read_image
from vdx.data.track_files import is_moving
from vdx.generate.video_io import frames_at

REFERENCE_MULTIPLE = 8  # sides of a reference become multiples of this first, as in diffusers


def open_image(name: str, path: str) -> Image.Image:
    """Return an image in RGB, as `vdx.data.images` reads it.

    Raises ConfigError that names the flag `name`.
    """
    try:
        return Image.fromarray(read_image(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{name}={path} is not an image that can be read: {error}.") from error


def iter_frames(name: str, path: str, fps: float) -> Iterator[Image.Image]:
    """Yield the frames of a video or an animation at 0, 1/fps, 2/fps, ... seconds.

    A file with one image yields that image without end. Raises ConfigError that names the
    flag `name`.
    """
    try:
        if is_moving(Path(path)):
            yield from map(Image.fromarray, frames_at(path, fps))
            return
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{name}={path}: {error}") from error
    yield from itertools.repeat(open_image(name, path))


def count_frames(name: str, path: str, fps: float, most: int) -> int:
    """Return the frames of a file at this rate, at most `most`. Raises ConfigError."""
    return sum(1 for _ in itertools.islice(iter_frames(name, path, fps), most))


def resize_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Return float32 [h w 3] in [-1, 1], or [h w] of a grey image.

    Proportions are not kept.
    """
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / 127.5 - 1


def letterbox(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Return float32 [h w 3] in [-1, 1]: the whole image inside a white frame.

    Follows the references of `WanVACEPipeline` of diffusers: the sides become multiples of
    REFERENCE_MULTIPLE, then pixels are interpolated linearly, also where the image shrinks.
    """
    # The size of the image, of multiples.
    w, h = (
        max(REFERENCE_MULTIPLE, side // REFERENCE_MULTIPLE * REFERENCE_MULTIPLE)
        for side in image.size
    )
    scale = min(height / h, width / w)
    inner_height = max(1, int(h * scale))
    inner_width = max(1, int(w * scale))

    # [h w 3] -> [inner_height inner_width 3]
    x = resize_image(image, h, w)
    for axis, size in enumerate((inner_height, inner_width)):
        x = _interpolate(x, axis, size)

    frame = np.ones((height, width, 3), np.float32)
    top = (height - inner_height) // 2
    left = (width - inner_width) // 2
    frame[top : top + inner_height, left : left + inner_width] = x
    return frame


def _interpolate(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Resample axis 0 or 1 of [h w c] linearly; pixel centres are half a pixel in."""
    length = x.shape[axis]
    positions = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    low = positions.astype(int)
    high = np.ceil(positions).astype(int)
    weight = np.float32(positions - low).reshape(-1, *[1] * (2 - axis))
    return x.take(low, axis) * (1 - weight) + x.take(high, axis) * weight


def mask_channels(mask: np.ndarray, frames: int, side: int) -> np.ndarray:
    """Return a mask [t h w] in [0, 1] at the resolution of `frames` latent frames.

    The result is [frames h/side w/side side*side]: the pixels of a latent pixel are channels. Of
    the frames of a latent frame the middle one counts.
    """
    t = len(mask)
    middle = (2 * np.arange(frames) + 1) * t // (2 * frames)
    return rearrange(mask[middle], "t (h i) (w j) -> t h w (i j)", i=side, j=side)


def given_mask(is_given: np.ndarray, grid: Sequence[int], rate: int) -> np.ndarray:
    """Return float32 [t h w rate]: which of the frames of a latent frame are given.

    is_given: bool, one for each frame of the clip; the first counts for all `rate` frames of the
    first latent frame. grid: (t, h, w) of the latents.
    """
    frames = np.concatenate([np.repeat(is_given[:1], rate), is_given[1:]])
    return np.broadcast_to(frames.reshape(-1, 1, 1, rate), (*grid, rate)).astype(np.float32)
