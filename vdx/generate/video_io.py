"""Clips on disk: mp4 and WebP out, frames with their times in."""

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vdx.data.video_files import open_video, pixels, seconds_per_tick
from vdx.files import atomic_write
from vdx.types import Array

__all__ = ["frames_at", "read_video", "to_uint8", "to_uint8_there", "write_video", "write_webp"]

BT709 = 1  # the number of this colour matrix, its primaries and its curve in H.264
LIMITED = 1  # the range of luma in H.264 that every player expects: 16 to 235


def to_uint8(x) -> np.ndarray:
    """Floats in [-1, 1] of any shape -> uint8, rounded; values outside are clipped."""
    x = np.asarray(x, np.float32)
    return np.rint(np.clip(x * 127.5 + 127.5, 0, 255)).astype(np.uint8)


def to_uint8_there(x: Array) -> Array:
    """`to_uint8` inside a program, with the same bits: a quarter of the bytes come to the host."""
    # A product and a sum after it may become one operation that rounds once. This is x * 127.5,
    # rounded as on the host: both products are exact.
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
    """uint8 [t h w 3], or its frames as they come -> an H.264 mp4 that any player shows, at
    exactly `fps`. Holds one frame, besides those that the encoder looks ahead.

    Small clips are enlarged by a whole factor until the shorter side has `min_side` pixels:
    players blur tiny videos, and 4:2:0 smears colours over two pixels. An odd height or width
    gets its last row or column twice, since 4:2:0 has none. Raises ValueError.
    """
    if isinstance(frames, np.ndarray):
        _check(frames, fps)
    first, frames = _peeked(frames)
    _check(first[None], fps)
    factor = -(-min_side // min(first.shape[:2]))
    height, width = (factor * n for n in first.shape[:2])
    rate = Fraction(fps).limit_denominator(1001)  # 24000 / 1001 as well as 12
    with (
        atomic_write(path) as part,
        av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as out,
    ):
        # x264's macroblock tree makes other bytes of the same frames from time to time.
        stream = out.add_stream(
            "libx264", rate=rate, options={"crf": "12", "preset": "medium", "mbtree": "0"}
        )
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = 1 / rate
        codec.color_range = LIMITED
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        for number, picture in enumerate(frames):
            picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
            picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts, frame.time_base = number, 1 / rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def _peeked(frames: Iterable[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """(the first, all of them)"""
    rest = iter(frames)
    first = next(rest, np.zeros((0, 0, 3), np.uint8))
    return first, itertools.chain([first], rest)


def read_video(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(frames uint8 [t h w 3], seconds float64 [t] from the first frame).

    Raises ValueError, naming the file, if it does not decode whole.
    """
    seconds, frames = zip(*_decoded(path), strict=True)
    return np.stack(frames), np.array(seconds)


def frames_at(path: str | Path, fps: float) -> Iterator[np.ndarray]:
    """The frames, uint8 [h w 3], that are nearest to 0, 1/fps, 2/fps, ... seconds from the first
    until the video ends. Decodes as far as it is asked and holds two. Raises as `read_video`."""
    count, last, shown = 0, 0.0, None
    for second, frame in _decoded(path):
        while shown is not None and count / fps < (last + second) / 2:
            yield shown
            count += 1
        last, shown = second, frame
    while shown is not None and count / fps < last + 0.5 / fps:
        yield shown
        count += 1


def _decoded(path: str | Path) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds from the first frame, uint8 [h w 3]) of every frame."""
    first = None
    try:
        container, stream = open_video(str(path))
        with container:
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.pts is None:
                    raise ValueError("damaged frames")
                first = frame.pts if first is None else first
                yield (frame.pts - first) * seconds_per_tick(stream), pixels(frame)
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable video: {getattr(error, 'strerror', None) or error}."
        ) from error
    if first is None:
        raise ValueError(f"{path} holds no frames.")


def write_webp(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """uint8 [t h w 3] -> an animated lossless WebP, which a README shows. Raises ValueError."""
    _check(frames, fps)
    ends = np.rint(np.arange(len(frames) + 1) * 1000 / fps).astype(int)  # milliseconds, no drift
    images = [Image.fromarray(frame) for frame in frames]
    with atomic_write(path) as part:
        images[0].save(
            part,
            format="WEBP",
            save_all=True,
            append_images=images[1:],
            duration=np.diff(ends).tolist(),
            loop=0,
            lossless=True,
            quality=100,
        )
