"""Pieces of clips, at the rate, size and length that a model is trained on.

A clip belongs to the bucket nearest to its shape and length, and is cut into pieces of that bucket,
one after another from its first frame. Frames are those that training reads from the same clip.
"""

import dataclasses
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vdx.config.build import ConfigError, check_fields
from vdx.config.ranges import ComputeType, Count, Positive
from vdx.data.buckets import ClipShape, nearest_bucket
from vdx.data.preparation.clips import read_clip
from vdx.data.record import BadRecord, clip_times
from vdx.data.resize import resize
from vdx.data.stream import BatchShape
from vdx.data.transforms import ClipSampling
from vdx.data.video_files import video_record

__all__ = ["LatentSettings", "Piece", "Pieces", "cut_pieces"]


@dataclasses.dataclass(frozen=True)
class LatentSettings:
    """`config.latents`: the pieces of clips, and how they are encoded."""

    num_frames: tuple[Count, ...] | Count = 17  # lengths of pieces; a clip has the longest it fills
    height: Count = 480  # pixels
    width: Count = 832  # pixels
    fps: Positive = 16.0  # frames a second; slower clips are left out
    # (frames, height, width) of several shapes, in place of num_frames, height and width. A clip
    # has the nearest that needs no enlarging.
    buckets: tuple[tuple[Count, Count, Count], ...] = ()
    batch: Count = 1  # pieces encoded at once on each device; halved when memory runs out
    dtype: ComputeType = "bfloat16"  # of the text encoder; the others are float32, as their makers'

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        check_fields(self, "config.latents")
        if not self.shapes:
            raise ConfigError("config.latents.num_frames is empty: give one or more lengths.")

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        """The buckets."""
        if self.buckets:
            return tuple(
                BatchShape(1, frames, (height, width)) for frames, height, width in self.buckets
            )
        lengths = self.num_frames
        if isinstance(lengths, int):
            lengths = (lengths,)
        return tuple(BatchShape(1, frames, (self.height, self.width)) for frames in lengths)


class Piece(NamedTuple):
    """A piece of a clip."""

    start: float  # seconds from the clip's start
    video: np.ndarray  # uint8 [t h w 3]


class Pieces(NamedTuple):
    """The pieces of one clip."""

    number: int
    pieces: Iterator[Piece]  # decoded when they are read


def cut_pieces(key: str, data: bytes, settings: LatentSettings) -> Pieces:
    """Return the pieces of a clip of the cache.

    key: names the clip in messages. data: see `read_clip`. Raises BadRecord for a clip that fills
    no bucket.
    """
    video = read_clip(data)["video"].tobytes()
    record = video_record(key, "", lambda: io.BytesIO(video))
    assert record.timestamps is not None  # a video has them
    height, width = record.read(record.timestamps[:1]).shape[1:3]

    # The nearest bucket.
    lengths = tuple(shape.frames or 0 for shape in settings.shapes)
    sampling = ClipSampling(num_frames=lengths, fps=settings.fps)
    shape = ClipShape(height, width, sampling.frames_available(record))
    number = nearest_bucket(shape, settings.shapes, sampling)
    if number is None:
        raise BadRecord(key, _why_none(shape, settings))
    frames = lengths[number]
    target_height, target_width = settings.shapes[number].size

    # Its pieces, in a row.
    count = shape.frames // frames
    times = clip_times(record, settings.fps, count * frames)

    def fit(frame: np.ndarray) -> np.ndarray:
        return resize(frame[None], target_height, target_width)[0]

    def read() -> Iterator[Piece]:
        for first in range(0, count * frames, frames):
            own = times[first : first + frames]
            yield Piece(float(own[0]), record.read_frames(own, fit))

    return Pieces(count, read())


def _why_none(shape: ClipShape, settings: LatentSettings) -> str:
    """Return why a clip fills no bucket."""
    shortest = min(bucket.frames or 0 for bucket in settings.shapes)
    if shape.frames < shortest:
        return (
            f"too short: {shape.frames} frames at {settings.fps:g} a second, the shortest piece "
            f"has {shortest}"
        )
    sizes = ", ".join(f"{h}x{w}" for h, w in dict.fromkeys(b.size for b in settings.shapes))
    return f"too small: {shape.height}x{shape.width} would be enlarged to {sizes}"
