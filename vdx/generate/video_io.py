"""Clips on disk: mp4, GIF and WebP out, frames with their times in."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vdx.config.build import ConfigError
from vdx.data.animation import iter_animation
from vdx.data.encoding import add_stream, yuv_frame
from vdx.data.images import SUFFIXES
from vdx.data.record import ROUNDING, clip_interval
from vdx.data.video_files import Footage, Opener, open_footage
from vdx.files import atomic_write
from vdx.types import Array

__all__ = [
    "frames_at",
    "read_video",
    "to_uint8",
    "to_uint8_on_device",
    "write_gif",
    "write_video",
    "write_webp",
]

MAX_GIF_FPS = 50  # browsers show frames of less than 20 ms for 100 ms


class NotFinite(ConfigError):
    """Drawn pixels are NaN or infinite, with these weights and settings."""


def check_finite(is_finite: Any, clip: str = "The clip") -> None:
    """Raise NotFinite unless all pixels are finite; clip: its name."""
    if not np.all(is_finite):
        raise NotFinite(
            f"{clip} has pixels that are NaN or infinite, and is not used. Either the weights "
            "hold such numbers, or an activation overflows: try a smaller guidance scale, more "
            "steps, dtype float32, or another checkpoint."
        )


def to_uint8(x: Any) -> np.ndarray:
    """Return floats in [-1, 1] as uint8, rounded; values outside are clipped.

    Raises NotFinite for pixels that are NaN or infinite.
    """
    x = np.asarray(x, np.float32)
    check_finite(np.isfinite(x))
    return np.rint(np.clip(x * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def to_uint8_on_device(x: Array) -> Array:
    """Return `to_uint8` inside a program, bit for bit, of finite pixels.

    The host receives a quarter of the bytes.
    """
    # XLA may fuse a product and the sum after it into one operation that rounds once. This is
    # x * 127.5, rounded as on the host: both products are exact.
    x = x.astype(jnp.float32)
    return jnp.rint(jnp.clip((128 * x - 0.5 * x) + 127.5, 0, 255)).astype(jnp.uint8)


def _check(frames: np.ndarray, fps: float) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"Frames are {frames.dtype} {frames.shape}, expected uint8 [t h w 3].")
    if not fps > 0:
        raise ValueError(f"fps = {fps} must be positive.")


def write_video(
    path: str | Path, frames: Iterable[np.ndarray], fps: float, min_side: int = 128
) -> None:
    """Write frames as an H.264 mp4 that any player shows, at exactly `fps`.

    frames: uint8 [t h w 3], or an iterable of [h w 3], of which memory holds one at a time and
    those that the encoder looks ahead.

    Small clips are enlarged by a whole factor until the shorter side has `min_side` pixels:
    players blur tiny videos, and 4:2:0 smears colours over two pixels. An odd height or width
    gets its last row or column twice, since 4:2:0 has none. Raises ValueError.
    """
    if isinstance(frames, np.ndarray):
        _check(frames, fps)
    first, frames = _peek(frames)
    _check(first[None], fps)

    # The size of the video, and its exact rate.
    factor = _enlargement(first, min_side)
    height = factor * first.shape[0]
    width = factor * first.shape[1]
    rate = Fraction(fps).limit_denominator(1001)  # 24000 / 1001 as well as 12
    options = {"movflags": "+faststart"}  # the index first: a browser may begin before the end
    with (
        atomic_write(path) as part,
        av.open(str(part), "w", format="mp4", options=options) as out,
    ):
        # H.264 with 4:2:0 needs even sides.
        stream = add_stream(out, rate, height + height % 2, width + width % 2)
        for number, frame in enumerate(frames):
            enlarged = _enlarge(frame, factor)
            even = np.pad(enlarged, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            out.mux(stream.encode(yuv_frame(even, number, rate)))

        # The frames that the encoder still holds.
        out.mux(stream.encode(None))


def _enlargement(frame: np.ndarray, min_side: int) -> int:
    """Return the whole factor that gives the shorter side at least `min_side` pixels."""
    return -(-min_side // min(frame.shape[:2]))


def _enlarge(frame: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of [h w 3] in both directions."""
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def _peek(frames: Iterable[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Return (the first frame, an iterator over all of them)."""
    rest = iter(frames)
    first = next(rest, np.zeros((0, 0, 3), np.uint8))
    return first, itertools.chain([first], rest)


def read_video(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (frames uint8 [t h w 3], seconds float64 [t] from the first frame).

    Raises ValueError, naming the file, if it does not decode as a whole.
    """
    seconds, frames = zip(*_open(path)[1], strict=True)
    return np.stack(frames), np.array(seconds)


def frames_at(path: str | Path, fps: float) -> Iterator[np.ndarray]:
    """Yield the frames, uint8 [h w 3], nearest to 0, 1/fps, 2/fps, ... seconds.

    Near-integer rates give frames in a row (see `vdx.data.record.frame_step`). Times count from the
    first frame. Ends where the video ends. Of an animated image, whose frames have durations of
    their own, those that are on the screen at these instants. Decodes no further than the caller
    iterates, and holds two frames. Raises ValueError as `read_video` does.
    """
    if Path(path).suffix.lower() in SUFFIXES:
        yield from _animation_at(path, fps)
        return

    footage, frames = _open(path)
    interval = clip_interval(footage.stamps, fps)
    count = 0
    last_second = 0.0
    last_frame = None
    for second, frame in frames:
        # The last frame is the nearest until halfway to this one.
        while last_frame is not None and count * interval < (last_second + second) / 2:
            yield last_frame
            count += 1
        last_second = second
        last_frame = frame
    while last_frame is not None and count < last_second / interval + 0.5:
        yield last_frame
        count += 1


def _animation_at(path: str | Path, fps: float) -> Iterator[np.ndarray]:
    """Yield the frames of an animation on the screen at 0, 1/fps, ... seconds."""
    count = 0
    end = 0.0
    for frame in iter_animation(path):
        end += frame.seconds
        while count / fps < end - ROUNDING:
            yield frame.pixels
            count += 1


@contextlib.contextmanager
def _errors_named(path: str | Path) -> Iterator[None]:
    """Raise ValueError, naming the file, for what a reader of videos raises."""
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable video: {getattr(error, 'strerror', None) or error}."
        ) from error


def _open(path: str | Path) -> tuple[Footage, Iterator[tuple[float, np.ndarray]]]:
    """Return the footage of a file, and its (seconds from the first, frame)."""
    opener = lambda: str(path)
    with _errors_named(path):
        footage = open_footage(opener)
    return footage, _decode(path, footage, opener)


def _decode(
    path: str | Path, footage: Footage, opener: Opener
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (seconds from the first frame, uint8 [h w 3]) of every frame."""
    with _errors_named(path):
        for number, frame in footage.frames(opener, range(len(footage.stamps))):
            yield float(footage.stamps[number]), frame


def write_webp(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write frames as an animated lossless WebP, which a README shows.

    frames: uint8 [t h w 3], or an iterable of [h w 3]. Raises ValueError for other arrays.
    """
    images = _images(frames, fps, min_side=1)
    milliseconds = _durations(len(images), fps, tick=1)
    _save_animation(path, images, milliseconds, format="WEBP", lossless=True, quality=100)


def write_gif(
    path: str | Path, frames: Iterable[np.ndarray], fps: float, min_side: int = 128
) -> None:
    """Write frames as an animated GIF that repeats, each with 256 colours of its own.

    frames: uint8 [t h w 3], or an iterable of [h w 3]; small ones are enlarged as `write_video`
    does. A frame of at most 256 colours is exact. Durations are whole hundredths of a second and
    do not drift. Raises ValueError for other arrays, and above MAX_GIF_FPS.
    """
    if fps > MAX_GIF_FPS:
        raise ValueError(f"A GIF shows at most {MAX_GIF_FPS} frames per second, not {fps:g}.")
    images = [image.quantize(256) for image in _images(frames, fps, min_side)]
    milliseconds = _durations(len(images), fps, tick=10)
    _save_animation(path, images, milliseconds, format="GIF", disposal=1)


def _save_animation(
    path: str | Path, images: list[Image.Image], milliseconds: list[int], **options: Any
) -> None:
    """Write images as an animation that repeats. options: of Pillow's writer."""
    with atomic_write(path) as part:
        images[0].save(
            part,
            save_all=True,
            append_images=images[1:],
            duration=milliseconds,
            loop=0,
            **options,
        )


def _images(frames: Iterable[np.ndarray], fps: float, min_side: int) -> list[Image.Image]:
    """Return enlarged frames as images. Raises ValueError as `write_video` does."""
    frames = frames if isinstance(frames, np.ndarray) else np.stack(list(frames))
    _check(frames, fps)
    factor = _enlargement(frames[0], min_side)
    return [Image.fromarray(_enlarge(frame, factor)) for frame in frames]


def _durations(count: int, fps: float, tick: int) -> list[int]:
    """Return the milliseconds of each frame, multiples of `tick`.

    Ends are rounded, not durations, so that the sum does not drift.
    """
    ends = np.rint(np.arange(count + 1) * 1000 / fps / tick).astype(int) * tick
    return np.diff(ends).tolist()
