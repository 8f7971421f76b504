"""Encoded video files: timestamps from the packets, frames at chosen instants.

Whatever a damaged or hostile file makes the decoder raise becomes BadRecord.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from vdx.data.display import decode_frames, display_pixels
from vdx.data.images import MOST_PIXELS
from vdx.data.record import BadRecord, Record, frame_index_at

__all__ = [
    "VIDEOS",
    "Opener",
    "decode",
    "guard",
    "open_video",
    "seconds_per_tick",
    "video_record",
]

T = TypeVar("T")

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
CONTAINERS = "avi,matroska,mp4"  # the containers of VIDEOS by their names in FFmpeg

# Returns a path, or a fresh BytesIO, of one encoded video.
Opener = Callable[[], str | io.BytesIO]


def open_video(file: str | io.BytesIO) -> tuple[InputContainer, VideoStream]:
    """Open a video file; return the container and its first video stream.

    FFmpeg also opens playlists, which name other files and addresses, and images. Only the
    containers of VIDEOS are accepted. Raises ValueError if there is no usable video stream.
    """
    try:
        container = av.open(
            file, "r", options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        )
    except av.error.ArgumentError as error:
        raise ValueError(f"not one of the containers {CONTAINERS}") from error
    try:
        return container, _video_stream(container)
    except BaseException:
        container.close()
        raise


def _video_stream(container: InputContainer) -> VideoStream:
    """Return the first video stream, limited in threads and in the size of frames."""
    if not container.streams.video:
        raise ValueError("no video stream")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None:
        raise ValueError("an unknown codec")
    if codec.width * codec.height > MOST_PIXELS:
        raise ValueError(f"frames of {codec.height}x{codec.width}, more than {MOST_PIXELS} pixels")

    codec.options = {"max_pixels": str(MOST_PIXELS)}  # the stream may contradict the header
    codec.thread_count = 1  # the loader's own threads share the cores
    return stream


def seconds_per_tick(stream: VideoStream) -> float:
    """Return the unit of a stream's presentation stamps, in seconds."""
    if stream.time_base is None:
        raise ValueError("a video stream without a time base")
    return float(stream.time_base)


class _Timeline(NamedTuple):
    """Presentation times of the frames of a video."""

    ticks: np.ndarray  # int [frames], ascending, in units of `tick`
    tick: float  # seconds
    duration: float  # seconds, from the first frame to the end of the last one


def _probe(file: str | io.BytesIO) -> _Timeline:
    """Return the timeline of a video, read from its packets; nothing is decoded.

    Times are never computed from a frame rate. Raises ValueError for a truncated file.
    """
    # A truncated file has fewer packets than its header promises.
    container, stream = open_video(file)
    with container:
        packets = [packet for packet in container.demux(stream) if packet.size]
        if len(packets) < stream.frames:
            raise ValueError(f"truncated: {len(packets)} of {stream.frames} frames are there")

        # Some packets only prepare the decoder for others.
        presented = [packet for packet in packets if not packet.is_discard]
        if not presented:
            raise ValueError("no frames")
        # Of several packets with one stamp the first counts.
        durations = {packet.pts: packet.duration for packet in reversed(presented)}
        if None in durations:
            raise ValueError("frames without presentation times")
        tick = seconds_per_tick(stream)

    ticks = np.unique(list(durations))
    last_duration: float = durations[int(ticks[-1])] or 0.0
    if not last_duration and len(ticks) > 1:  # not every container stores it
        last_duration = float(np.median(np.diff(ticks)))
    return _Timeline(ticks, tick, float(ticks[-1] - ticks[0] + last_duration) * tick)


def decode(file: str | io.BytesIO, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """Return the frames at some presentation stamps: stamp -> uint8 [h w 3].

    wanted: the stamps, in ticks of the stream.

    Decodes from the key frame before the first stamp to the last one. Raises ValueError for a
    damaged frame on the way; the decoder itself would only conceal it.
    """
    container, stream = open_video(file)
    found: dict[int, np.ndarray] = {}
    needed = {int(stamp) for stamp in wanted}

    with container:
        # Seek to the key frame before the first frame that is needed.
        if min(needed) > (stream.start_time or 0):
            container.seek(min(needed), stream=stream)
        for frame in decode_frames(container, stream):
            if frame.is_corrupt:
                raise ValueError("damaged frame")
            if frame.pts in needed:
                found[frame.pts] = display_pixels(frame, stream)
                if len(found) == len(needed):
                    break

    if len(found) < len(needed):
        raise ValueError(f"{len(needed) - len(found)} of {len(needed)} frames do not decode")
    return found


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


def video_record(key: str, caption: Any, opener: Opener) -> Record:
    """Return the record of an encoded video.

    Timestamps count from the first frame. Raises BadRecord, at once or in `read`.
    """
    if caption is None:
        raise BadRecord(key, "the caption is missing")
    if not isinstance(caption, str):
        raise BadRecord(key, f"the caption is {type(caption).__name__}, expected text")

    # Timestamps are read at once, frames when they are needed.
    timeline = guard(key, lambda: _probe(opener()))
    ticks = timeline.ticks
    stamps = (ticks - ticks[0]) * timeline.tick

    def read(times: np.ndarray) -> np.ndarray:
        wanted = ticks[frame_index_at(stamps, times)]
        frames = guard(key, lambda: decode(opener(), wanted))
        sizes = {frame.shape[:2] for frame in frames.values()}
        if len(sizes) > 1:
            changes = " then ".join(f"{height}x{width}" for height, width in sorted(sizes))
            raise BadRecord(key, f"the frames change size: {changes}")
        return np.stack([frames[int(stamp)] for stamp in wanted])

    return Record(key, caption, timeline.duration, stamps, read)
