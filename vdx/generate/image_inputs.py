"""What a request shows to a model: pictures and videos from files, as the model is to see them."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

from vdx.config.build import ConfigError
from vdx.data.video_files import VIDEOS
from vdx.generate.video_io import frames_at

CUT = 8  # a reference's sides are first made multiples of this


def open_picture(name: str, path: str) -> Image.Image:
    """RGB, upright; `name` is the flag that an error names."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"--{name}={path} is not a picture that can be read: {error}.") from error


def iter_frames(name: str, path: str, fps: float) -> Iterator[Image.Image]:
    """A video's pictures nearest to 0, 1/fps, 2/fps, ... seconds, one at a time; of a file that
    is one picture, that picture without end. Raises ConfigError."""
    if Path(path).suffix.lower() not in VIDEOS:
        yield from itertools.repeat(open_picture(name, path))
    try:
        yield from map(Image.fromarray, frames_at(path, fps))
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from error


def fitted(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """float32 [h w 3] in [-1, 1], or [h w] of a grey picture; proportions are not kept."""
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / 127.5 - 1


def letterbox(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """float32 [h w 3] in [-1, 1]: the whole picture in the middle of a white one, as
    `WanVACEPipeline` of diffusers shows a reference: first its sides become multiples of CUT,
    then it is interpolated linearly, also where it shrinks."""
    w, h = (max(CUT, side // CUT * CUT) for side in picture.size)
    scale = min(height / h, width / w)
    inner = max(1, int(h * scale)), max(1, int(w * scale))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    x = fitted(picture, h, w)
    for axis, size in enumerate(inner):
        at = np.clip((np.arange(size) + 0.5) * x.shape[axis] / size - 0.5, 0, x.shape[axis] - 1)
        low = at.astype(int)
        part = np.float32(at - low).reshape(-1, *[1] * (2 - axis))
        x = x.take(low, axis) * (1 - part) + x.take(np.ceil(at).astype(int), axis) * part
    out = np.ones((height, width, 3), np.float32)
    out[top : top + inner[0], left : left + inner[1]] = x
    return out


def mask_channels(mask: np.ndarray, frames: int, side: int) -> np.ndarray:
    """A mask [t h w] in [0, 1] for latents of so many frames: [frames h/side w/side side*side],
    the pixels behind a latent one as channels, of the frame in the middle of those behind it."""
    t = len(mask)
    middle = (2 * np.arange(frames) + 1) * t // (2 * frames)
    return rearrange(mask[middle], "t (h i) (w j) -> t h w (i j)", i=side, j=side)
