"""Encoded video and animated images: frames in display order, at random.

Containers differ in what their times mean, and files in what their headers claim. The order of
the decoder's output is the display order, and every read is compared with it. Whatever a damaged
or hostile file makes the decoder raise becomes BadRecord.
"""

import dataclasses
import functools
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import av
import numpy as np

from vdx.data.animation import is_animation, iter_animation
from vdx.data.containers import Opener, check_complete, first_bytes
from vdx.data.display import display_pixels
from vdx.data.mp4_boxes import Aperture
from vdx.data.packets import (
    Decoded,
    apply_edits,
    decode_packets,
    display_times,
    output_order,
    read_packets,
)
from vdx.data.record import BadRecord, FrameFunction, Record, frame_index_at

__all__ = [
    "ANIMATION",
    "VIDEOS",
    "DisplayedFrame",
    "Footage",
    "Opener",
    "guard",
    "is_video",
    "open_footage",
    "video_record",
]

T = TypeVar("T")

# Suffixes of files that always are clips, in lower case.
VIDEOS = (
    ".apng",
    ".avi",
    ".gif",
    ".m2ts",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".mts",
    ".ts",
    ".webm",
)
MAYBE_ANIMATED = (".png", ".webp")  # suffixes of images, some of which are clips
INTRA = 1  # FFmpeg's type of frames that are coded without others, "I"
ANIMATION = re.compile(rb"GIF8|\x89PNG|RIFF.{4}WEBP", re.DOTALL)  # first bytes of the files
MOST_BYTES = 1 << 31  # of the frames of one read
MOST_TIMELINES = 128  # kept in memory: 3 MB for an hour of video


class DisplayedFrame(NamedTuple):
    """One frame as players show it."""

    number: int  # in display order
    pixels: np.ndarray  # uint8 [h w 3]
    quantiser: float | None  # mean of H.264's quantiser over the frame


class Footage(Protocol):
    """Frames in display order, of an encoded video or an animated image."""

    @property
    def stamps(self) -> np.ndarray:
        """Times of the frames, float64 [frames]: seconds from the first one, ascending."""

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last one."""

    @property
    def origin(self) -> float:
        """Time of the first frame in the container, in seconds, as audio has it."""

    @property
    def starts(self) -> np.ndarray:
        """Numbers of the frames where decoding may start, int [starts]."""

    def all_frames(self, opener: Opener, start: int = 0) -> Iterator[DisplayedFrame]:
        """Yield the frames from a number on, in one decode; memory holds one at a time."""

    def frames(self, opener: Opener, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number, uint8 [h w 3]) of the frames `wanted`, which ascend."""


def guard(key: str, work: Callable[[], T], what: str = "video") -> T:
    """Return `work()`; whatever a bad file makes it raise becomes BadRecord of `key`.

    what: names the file in the message.
    """
    try:
        return work()
    except BadRecord as error:
        if error.key == key:
            raise
        raise BadRecord(key, f"not a usable {what}: {error.reason}") from error
    except Exception as error:  # there is no list of what decoders raise on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRecord(key, f"not a usable {what}: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Animation:
    """The frames of an animated image; each is drawn over the one before."""

    stamps: np.ndarray  # float64 [frames], seconds from the first frame
    duration: float  # seconds
    origin: float = 0.0  # seconds

    @property
    def starts(self) -> np.ndarray:
        """Numbers of the frames where decoding may start: the first."""
        return np.zeros(1, int)

    def all_frames(self, opener: Opener, start: int = 0) -> Iterator[DisplayedFrame]:
        """Yield the frames from a number on, in one decode; memory holds one at a time."""
        for number, pixels in self.frames(opener, range(start, len(self.stamps))):
            yield DisplayedFrame(number, pixels, None)

    def frames(self, opener: Opener, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number, uint8 [h w 3]) of the frames `wanted`, which ascend."""
        kept = set(wanted)
        for number, frame in enumerate(iter_animation(opener())):
            if number in kept:
                yield number, frame.pixels
            if number == wanted[-1]:
                return


def _open_animation(opener: Opener) -> Animation:
    """Return the timeline of an animated image."""
    durations = [frame.seconds for frame in iter_animation(opener())]
    ends = np.cumsum(durations)
    return Animation(np.append(0.0, ends[:-1]), float(ends[-1]))


@dataclasses.dataclass(frozen=True)
class Movie:
    """The frames of an encoded video, by the packets that they are decoded from.

    Coded frames are all frames in display order. An edit list may show a part of them.
    """

    stamps: np.ndarray  # float64 [frames], seconds from the first frame, ascending
    duration: float  # seconds, from the first frame to the end of the last one
    coded: np.ndarray  # int [frames], number of the coded frame of each
    packets: np.ndarray  # int [coded frames], number of the packet of each
    first_packet: int  # decoding from here gives every coded frame
    keys: np.ndarray  # int [keys], coded frames of key packets, where decoding may start
    aperture: Aperture | None  # the part of each frame that is shown
    origin: float = 0.0  # time of the first frame in the container, in seconds, as audio has it
    partial: bool = False  # the file ends at the first incomplete packet

    @property
    def starts(self) -> np.ndarray:
        """Numbers of the frames where decoding may start, int [starts]."""
        return np.flatnonzero(np.isin(self.coded, self.keys))

    def all_frames(self, opener: Opener, start: int = 0) -> Iterator[DisplayedFrame]:
        """Yield the frames from a number on, in one decode; memory holds one at a time.

        Raises ValueError for frames that do not decode; the decoder would only conceal them.
        """
        for number, decoded in self._decoded(opener, range(start, len(self.stamps))):
            yield DisplayedFrame(number, self._pixels(decoded), _quantiser(decoded.frame))

    def frames(self, opener: Opener, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number, uint8 [h w 3]) of the frames `wanted`, which ascend.

        Raises ValueError for frames that do not decode; the decoder would only conceal them.
        """
        for number, decoded in self._decoded(opener, wanted):
            yield number, self._pixels(decoded)

    def _pixels(self, decoded: Decoded) -> np.ndarray:
        """Return a decoded frame as players show it, uint8 [h w 3]."""
        return display_pixels(decoded.frame, decoded.stream, self.aperture, decoded.matrix)

    def _decoded(self, opener: Opener, wanted: Sequence[int]) -> Iterator[tuple[int, Decoded]]:
        """Yield (number, decoded frame) of the frames `wanted`, which ascend."""
        # An edit list may go back: decode each run of ascending coded frames by itself.
        coded = self.coded[list(wanted)]
        ends = np.flatnonzero(np.diff(coded) <= 0) + 1
        for run in np.split(np.asarray(wanted), ends):
            yield from self._decoded_run(opener, run.tolist())

    def _decoded_run(self, opener: Opener, wanted: Sequence[int]) -> Iterator[tuple[int, Decoded]]:
        """Yield (number, decoded frame) of frames `wanted` whose coded frames ascend."""
        numbers = dict(zip(self.coded[wanted].tolist(), wanted, strict=True))
        for coded, decoded in self._from(opener, min(numbers)):
            if coded in numbers:
                yield numbers.pop(coded), decoded
            if not numbers:
                return

    def _from(self, opener: Opener, number: int) -> Iterator[tuple[int, Decoded]]:
        """Yield (number, decoded frame) of the coded frames from a number, in order.

        Decoding starts at the last key packet, and again earlier, in the end at the start, if
        frames are missing from there or come in another order.
        """
        # The last two key packets that are before the frame when shown and when decoded.
        usable = (self.keys <= number) & (self.packets[self.keys] <= self.packets[number])
        last_two = self.packets[self.keys[usable]][:-3:-1].tolist()

        for start in dict.fromkeys((*last_two, self.first_packet)):
            try:
                for found, decoded in self._decode(opener(), start):
                    if found > number:
                        break
                    if found == number:
                        yield number, decoded
                        number += 1
            except (av.error.FFmpegError, ValueError):
                if start == self.first_packet:
                    raise
        if number < len(self.packets):
            raise ValueError(
                f"frame {number} of {len(self.packets)} does not decode in its turn: damage, or a "
                "cut inside a group of frames"
            )

    def _decode(self, file: str | io.BytesIO, start: int) -> Iterator[tuple[int, Decoded]]:
        """Yield (number, decoded frame) as the decoder gives them from packet `start` on."""
        numbers = {packet: number for number, packet in enumerate(self.packets.tolist())}
        certain = start == self.first_packet
        for decoded in decode_packets(file, start, self.partial):
            # In a stream without whole key frames the image is only complete later. Packets may
            # claim to be keys, and frames to be points of recovery; intra frames of VP9 and AV1
            # may come before frames that need earlier ones.
            frame = decoded.frame
            is_key = frame.key_frame and frame.pict_type == INTRA
            if not certain and not is_key:
                raise ValueError("decoding cannot start here")
            certain = True

            if decoded.packet in numbers:
                if frame.is_corrupt:
                    raise ValueError("damaged frame")
                yield numbers[decoded.packet], decoded


def _quantiser(frame: av.VideoFrame) -> float | None:
    """Return the mean of H.264's quantiser over a frame; None for other codecs."""
    parameters: Any = frame.side_data.get("VIDEO_ENC_PARAMS")
    if parameters is None:
        return None
    return float(parameters.qp_map().mean())


def _open_movie(opener: Opener, partial: bool = False) -> Movie:
    """Return the timeline of an encoded video.

    Times are never computed from a frame rate. Raises ValueError.
    """
    packets = read_packets(opener(), partial)
    if packets.shown_as_stamped:
        numbers = np.argsort(packets.shown_at)
    else:
        numbers = output_order(opener(), packets.first_key, partial)
    if not len(numbers):
        raise ValueError("no frames")

    # Of several frames at one time the first counts.
    ticks = display_times(packets, numbers)
    kept = np.append(True, np.diff(ticks) > 0)
    ticks = ticks[kept]
    numbers = numbers[kept]

    visible = apply_edits(packets.track.edits, ticks, packets.tick)
    ticks = visible.ticks
    last_duration = float(packets.durations[numbers[visible.frames[-1]]])
    if not last_duration and len(ticks) > 1:  # not every container stores it
        last_duration = float(np.median(np.diff(ticks)))
    return Movie(
        stamps=(ticks - ticks[0]) * float(packets.tick),
        duration=(float(ticks[-1] - ticks[0]) + last_duration) * float(packets.tick),
        coded=visible.frames,
        packets=numbers,
        first_packet=packets.first_key,
        keys=np.flatnonzero(packets.is_key[numbers]),
        aperture=packets.track.aperture,
        origin=float(ticks[0] * packets.tick),
        partial=partial,
    )


@functools.lru_cache(maxsize=MOST_TIMELINES)
def _open_movie_once(path: str, size: int, changed_at: int) -> Movie:
    """Return the timeline of a file; one that has not changed is not decoded again.

    size, changed_at: bytes, and nanoseconds of the last change.
    """
    return _open_movie(lambda: path)


def is_video(path: Path) -> bool:
    """Return true if a file is a clip: by suffix; PNG and WebP by their frames."""
    suffix = path.suffix.lower()
    if suffix not in MAYBE_ANIMATED:
        return suffix in VIDEOS
    try:
        return is_animation(path)
    except (ValueError, OSError):
        return False


def open_footage(opener: Opener, partial: bool = False) -> Footage:
    """Return the footage of a file, by what it contains.

    partial: of a truncated video, return what is there.

    Raises ValueError, OSError and what decoders raise.
    """
    file = opener()
    if not partial:
        check_complete(file)
    if ANIMATION.match(first_bytes(file)):
        return _open_animation(opener)
    if isinstance(file, str) and not partial:
        status = os.stat(file)
        return _open_movie_once(file, status.st_size, status.st_mtime_ns)
    return _open_movie(opener, partial)


def video_record(key: str, caption: Any, opener: Opener) -> Record:
    """Return the record of an encoded video or an animated image.

    Timestamps count from the first frame. Raises BadRecord, at once or in `read`.
    """
    if caption is None:
        raise BadRecord(key, "the caption is missing")
    if not isinstance(caption, str):
        raise BadRecord(key, f"the caption is {type(caption).__name__}, expected text")

    # Timestamps are read at once, frames when they are needed.
    footage = guard(key, lambda: open_footage(opener))

    def read_each(times: np.ndarray, each: FrameFunction) -> np.ndarray:
        wanted = frame_index_at(footage.stamps, times)
        return guard(key, lambda: _read(footage, opener, wanted, each))

    def read(times: np.ndarray) -> np.ndarray:
        return read_each(times, lambda frame: frame)

    return Record(key, caption, footage.duration, footage.stamps, read, read_each=read_each)


def _read(footage: Footage, opener: Opener, wanted: np.ndarray, each: FrameFunction) -> np.ndarray:
    """Return `each(frame)` of the frames `wanted` [t], stacked, one at a time."""
    result = None
    shape = None
    for number, frame in footage.frames(opener, np.unique(wanted).tolist()):
        # All frames have the size of the first.
        shape = shape or frame.shape[:2]
        if frame.shape[:2] != shape:
            sizes = [f"{height}x{width}" for height, width in (shape, frame.shape[:2])]
            raise ValueError(f"the frames change size: {' then '.join(sizes)}")

        value = each(frame)
        if result is None:
            _check_bytes(len(wanted) * value.nbytes, len(wanted), shape)
            result = np.empty((len(wanted), *value.shape), value.dtype)
        result[wanted == number] = value
    assert result is not None
    return result


def _check_bytes(num_bytes: int, frames: int, shape: tuple[int, int]) -> None:
    """Raise ValueError for a read of more than MOST_BYTES."""
    if num_bytes > MOST_BYTES:
        raise ValueError(
            f"{frames} frames of {shape[0]}x{shape[1]} take {num_bytes} bytes, more than "
            f"{MOST_BYTES}: read fewer, or make a smaller copy of the file"
        )
