"""Reading of encoded video files: timestamps from the packets, frames at chosen instants."""

import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np

from vdx.data.record import BadRecord, Record, frame_index_at

__all__ = ["VIDEOS", "Opener", "decode", "guard", "open_video", "pixels", "video_record"]

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
CONTAINERS = "avi,matroska,mp4"  # as FFmpeg calls those of VIDEOS
MOST_PIXELS = 1 << 26  # of a frame; a damaged or hostile header may ask for all memory

Opener = Callable[[], str | io.BytesIO]


def open_video(file: str | io.BytesIO):
    """(container, its first video stream). Raises ValueError where there is none.

    FFmpeg would also open playlists, which name other files and addresses, and pictures: what
    the file says it is must be one of the containers of VIDEOS.
    """
    try:
        container = av.open(
            file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        )
    except av.error.ArgumentError as error:
        raise ValueError(f"not one of the containers {CONTAINERS}") from error
    try:
        return container, _video_stream(container)
    except BaseException:
        container.close()
        raise


def _video_stream(container):
    if not container.streams.video:
        raise ValueError("no video stream")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None:
        raise ValueError("an unknown codec")
    if codec.width * codec.height > MOST_PIXELS:
        raise ValueError(f"frames of {codec.height}x{codec.width}, more than {MOST_PIXELS} pixels")
    codec.options = {"max_pixels": str(MOST_PIXELS)}  # the stream itself may say otherwise
    codec.thread_count = 1  # the loader's own threads share the cores
    return stream


def pixels(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [h w 3] of a decoded frame, upright: phones store the turn beside the picture."""
    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return np.ascontiguousarray(turned)


def _probe(file: str | io.BytesIO) -> tuple[np.ndarray, float, float]:
    """(presentation stamps, ascending, in ticks; seconds in a tick; duration in seconds).

    Read from the packets and never guessed from a frame rate; nothing is decoded.
    """
    container, stream = open_video(file)
    with container:
        packets = [p for p in container.demux(stream) if p.size]
        if len(packets) < stream.frames:
            raise ValueError(f"truncated: {len(packets)} of {stream.frames} frames are there")
        shown = [p for p in packets if not p.is_discard]
        if not shown or any(p.pts is None for p in shown):
            raise ValueError("no frames" if not shown else "frames without presentation times")
        tick = float(stream.time_base)
        stamps = np.unique([p.pts for p in shown])
        last = max(shown, key=lambda p: p.pts).duration
    if not last:  # not every container says how long the last frame stays
        last = float(np.median(np.diff(stamps))) if len(stamps) > 1 else 0.0
    return stamps, tick, float(stamps[-1] - stamps[0] + last) * tick


def decode(file: str | io.BytesIO, wanted: np.ndarray) -> dict[int, np.ndarray]:
    """The frames with the presentation stamps `wanted` (ticks): stamp -> uint8 [h w 3].

    Decodes from the key frame before the first to the last that is wanted. Raises ValueError
    for a damaged frame on the way, which the decoder itself would only paint over.
    """
    container, stream = open_video(file)
    found: dict[int, np.ndarray] = {}
    needed = {int(stamp) for stamp in wanted}
    with container:
        if min(needed) > (stream.start_time or 0):
            container.seek(min(needed), stream=stream)
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError("damaged frame")
            if frame.pts in needed:
                found[frame.pts] = pixels(frame)
                if len(found) == len(needed):
                    break
    if len(found) < len(needed):
        raise ValueError(f"{len(needed) - len(found)} of {len(needed)} frames do not decode")
    return found


def guard(key: str, work: Callable, *arguments, what: str = "video"):
    """`work(*arguments)`, with whatever a bad file makes it raise as BadRecord."""
    try:
        return work(*arguments)
    except BadRecord as error:
        if error.key == key:
            raise
        raise BadRecord(key, f"not a usable {what}: {error.reason}") from error
    except Exception as error:  # there is no list of what decoders raise on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadRecord(key, f"not a usable {what}: {reason}") from error


def video_record(key: str, caption: Any, opener: Opener) -> Record:
    """The record of an encoded video; `opener()` gives a path or a fresh BytesIO.

    Timestamps count from the first frame. Raises BadRecord, at once or in `read`.
    """
    if not isinstance(caption, str):
        raise BadRecord(
            key,
            "the caption is missing"
            if caption is None
            else f"the caption is {type(caption).__name__}, expected text",
        )
    ticks, tick, duration = guard(key, lambda: _probe(opener()))
    stamps = (ticks - ticks[0]) * tick

    def read(times: np.ndarray) -> np.ndarray:
        wanted = ticks[frame_index_at(stamps, times)]
        found = guard(key, lambda: decode(opener(), wanted))
        sizes = {frame.shape[:2] for frame in found.values()}
        if len(sizes) > 1:
            raise BadRecord(
                key,
                "the frames change size: "
                + " then ".join(f"{height}x{width}" for height, width in sorted(sizes)),
            )
        return np.stack([found[int(stamp)] for stamp in wanted])

    return Record(key, caption, duration, stamps, read)
