"""Containers of encoded video: which are accepted, their bounds, their ends."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from vdx.files import open_regular

__all__ = [
    "CONTAINERS",
    "MOST_PACKETS",
    "MOST_PIXELS",
    "Opener",
    "check_complete",
    "first_bytes",
    "open_bytes",
    "open_video",
]

# FFmpeg's names of the containers of VIDEOS.
CONTAINERS = "avi,matroska,mp4,mpeg,mpegts,mpegvideo"
MOST_PIXELS = 8192 * 4352  # of a frame: 8K; a hostile header may demand all memory
MOST_PACKETS = 1 << 21  # of a stream: 19 hours at 30 frames per second
MOST_BOXES = 1 << 18  # of an mp4 at its top level; each fragment has two

# Returns a path, or a fresh BytesIO, of one encoded video.
Opener = Callable[[], str | io.BytesIO]


def open_video(file: str | io.BytesIO) -> tuple[InputContainer, VideoStream]:
    """Open a video file; return the container and its first video stream.

    FFmpeg also opens playlists, which name other files and addresses, and images. Only CONTAINERS
    are accepted. Edit lists are left to `vdx.data.mp4_boxes`. Raises ValueError if there is no
    usable video stream.
    """
    # FFmpeg takes the name "a:b.mp4" for an address of the protocol a.
    name = f"file:{file}" if isinstance(file, str) else file
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "file",
        "ignore_editlist": "1",
    }
    try:
        container = av.open(name, "r", options=options)
    except av.error.ArgumentError as error:
        raise ValueError(f"not one of the containers {CONTAINERS}") from error
    try:
        return container, _video_stream(container)
    except BaseException:
        container.close()
        raise


def _video_stream(container: InputContainer) -> VideoStream:
    """Return the first video stream, limited in threads and in the size of frames."""
    # Music and films have their cover as a video stream of one frame.
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        raise ValueError("no video stream of a known codec")
    stream = streams[0]
    codec = stream.codec_context
    if codec is None:
        raise ValueError("an unknown codec")
    if not codec.width * codec.height:
        raise ValueError("frames of unknown size: the header of the video stream is missing")
    if codec.width * codec.height > MOST_PIXELS:
        raise ValueError(f"frames of {codec.height}x{codec.width}, more than {MOST_PIXELS} pixels")

    codec.options = {"max_pixels": str(MOST_PIXELS)}  # the stream may contradict the header
    if codec.name == "h264":  # of other codecs FFmpeg exports no quantisers, or loses frames
        codec.options = {**codec.options, "export_side_data": "venc_params"}
    codec.thread_count = 1  # the loader's own threads share the cores
    return stream


def check_complete(file: str | io.BytesIO) -> None:
    """Raise ValueError for a file that ends before its container says.

    Numbers of frames and durations in headers are estimates and are not compared. MPEG program
    streams declare nothing.
    """
    with open_bytes(file) as opened:
        _check_end(opened)


def first_bytes(file: str | io.BytesIO) -> bytes:
    """Return the first bytes of a file, which state its format."""
    with open_bytes(file) as opened:
        return opened.read(16)


@contextlib.contextmanager
def open_bytes(file: str | io.BytesIO) -> Iterator[BinaryIO]:
    """Yield a file that is open for reading, from its start."""
    if isinstance(file, io.BytesIO):
        file.seek(0)
        yield file
        file.seek(0)
        return
    with open_regular(file) as opened:
        yield opened


def _check_end(file: BinaryIO) -> None:
    """Raise ValueError if an open file is shorter than its container declares."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(1024)

    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
        declared = _mp4_end(file, size)
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        declared = _matroska_end(head, size)
    elif head[:4] == b"RIFF":
        declared = _riff_end(file, size)
    else:
        declared = _transport_stream_end(head, size)
    if declared > size:
        raise ValueError(f"truncated: {size} of {declared} bytes are there")


def _mp4_end(file: BinaryIO, size: int) -> int:
    """Return where the boxes of an mp4 end (ISO/IEC 14496-12, 4.2)."""
    end = 0
    for _ in range(MOST_BOXES):
        file.seek(end)
        header = file.read(16)
        length = int.from_bytes(header[:4])
        if length == 1:  # the length follows, in 64 bits
            length = int.from_bytes(header[8:16])
        if length < 8 or not header[4:8].isalnum():  # the last box, or padding
            return max(end, size) if len(header) >= 8 else end
        end += length
        if end >= size:
            return end
    raise ValueError(f"more than {MOST_BOXES} boxes")


def _matroska_end(head: bytes, size: int) -> int:
    """Return where the segment of a Matroska or WebM file ends (RFC 8794, 4 to 6)."""
    # The header, then the segment, each as its identity, its length and its data.
    place = 4
    length, width = _ebml_length(head, place)
    place += width + length
    if head[place : place + 4] != b"\x18\x53\x80\x67":
        return size

    place += 4
    length, width = _ebml_length(head, place)
    if length == (1 << 7 * width) - 1:  # unknown: a live recording
        return size
    return place + width + length


def _ebml_length(head: bytes, place: int) -> tuple[int, int]:
    """Return (length, bytes that state it); leading zero bits count these."""
    first = int.from_bytes(head[place : place + 1])
    width = 9 - first.bit_length()
    marked = int.from_bytes(head[place : place + width])
    return marked & ((1 << 7 * width) - 1), width


def _riff_end(file: BinaryIO, size: int) -> int:
    """Return where the RIFF chunks of an AVI end; a large one has several."""
    end = 0
    while end < size:
        file.seek(end)
        header = file.read(8)
        length = int.from_bytes(header[4:8], "little")
        if header[:4] != b"RIFF" or length == 0:  # other data, or a live recording
            return size
        end += 8 + length
    return end


def _transport_stream_end(head: bytes, size: int) -> int:
    """Return where the last packet of an MPEG transport stream ends."""
    for length, sync in ((188, 0), (192, 4), (204, 0)):
        if len(head) > sync + length and head[sync] == head[sync + length] == 0x47:
            return -(-size // length) * length
    return size
