"""Packets of encoded video: their times and the display order of frames."""

import array
import io
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from vdx.data.containers import MOST_PACKETS, open_bytes, open_video
from vdx.data.display import decoder_of, display_matrix
from vdx.data.mp4_boxes import Edit, Track, read_track

__all__ = [
    "Decoded",
    "Packets",
    "Shown",
    "apply_edits",
    "decode_packets",
    "display_times",
    "output_order",
    "read_packets",
]

NO_TIME = np.iinfo(np.int64).min  # FFmpeg's number for a missing time
# Codecs of which each packet is shown once, at the time that it states.
ONE_FRAME_A_PACKET = ("av1", "h264", "hevc", "vp9")
STAMPED = ("matroska", "mov")  # containers that store the time at which a frame is shown


class Packets(NamedTuple):
    """The packets of a video stream, in decoding order."""

    shown_at: np.ndarray  # int64 [packets], presentation times in ticks, or NO_TIME
    decoded_at: np.ndarray  # int64 [packets], decoding times in ticks, or NO_TIME
    durations: np.ndarray  # int64 [packets], ticks; 0: not stated
    is_key: np.ndarray  # bool [packets]
    tick: Fraction  # seconds
    shown_as_stamped: bool  # each packet is one frame, shown at the time that it states
    track: Track  # what the header of an mp4 states

    @property
    def first_key(self) -> int:
        """Return the number of the first key packet; 0 if there is none."""
        return int(np.argmax(self.is_key))


def read_packets(file: str | io.BytesIO, partial: bool = False) -> Packets:
    """Return the packets of a video; nothing is decoded, and their data is not kept.

    partial: end at the first incomplete packet, where others raise ValueError.
    """
    rows = array.array("q")
    container, stream = open_video(file)
    with container:
        for packet in _demux(container, stream, partial):
            times = (NO_TIME if t is None else t for t in (packet.pts, packet.dts))
            rows.extend((*times, packet.duration or 0, packet.is_keyframe))
        if stream.time_base is None:
            raise ValueError("a video stream without a time base")
        tick = stream.time_base
        codec = stream.codec_context.codec
        name = container.format.name
        number = stream.id
    if not rows:
        raise ValueError("no frames")
    if name.startswith("mov") and codec.canonical_name == "mpeg1video":
        # FFmpeg applies neither edit lists nor cuts to it.
        raise ValueError("MPEG-1 in an mp4 has no certain order of frames: store it as .mpg")

    track = Track(edits=(), aperture=None)
    if name.startswith("mov"):
        with open_bytes(file) as opened:
            track = read_track(opened, number)

    shown_at, decoded_at, durations, is_key = np.array(rows).reshape(-1, 4).T
    if name == "avi":  # it states when packets are decoded; FFmpeg guesses when they are shown
        shown_at = decoded_at
    # A file that was cut without encoding it may start with frames that cannot be decoded.
    starts_clean = is_key[0] and shown_at[0] == shown_at.min() > NO_TIME
    unique = len(np.unique(shown_at)) == len(shown_at)
    simple = codec.intra_only or (
        name.startswith(STAMPED) and codec.canonical_name in ONE_FRAME_A_PACKET
    )
    return Packets(
        shown_at,
        decoded_at,
        durations,
        is_key.astype(bool),
        tick,
        shown_as_stamped=bool(starts_clean and unique and simple),
        track=track,
    )


def output_order(file: str | io.BytesIO, start: int, partial: bool = False) -> np.ndarray:
    """Return the packet of each frame in display order, int [frames]; decodes all."""
    numbers: list[int] = []
    for decoded in decode_packets(file, start, partial):
        if not decoded.frame.is_corrupt:
            numbers.append(decoded.packet)
        elif partial and numbers:
            break
        elif numbers or decoded.packet == start:  # others are shown before the first key frame
            raise ValueError("damaged frame")
    return np.array(numbers, int)


def display_times(packets: Packets, numbers: np.ndarray) -> np.ndarray:
    """Return the times of frames in display order, int64 [frames] ticks.

    Raises ValueError if the times of the packets contradict the order.
    """
    shown_at = packets.shown_at[numbers]
    if shown_at.min() > NO_TIME and np.all(np.diff(shown_at) >= 0):
        return shown_at

    # Old containers state when packets are decoded: at the rate at which frames are shown. A cut
    # between frames that were reordered loses those that are shown before all others.
    decoded_at = packets.decoded_at
    if decoded_at.min() > NO_TIME and np.all(np.diff(decoded_at) > 0):
        second = int(np.sort(numbers)[1])
        used = np.union1d(numbers, np.arange(second))
        return decoded_at[used][-len(numbers) :]
    raise ValueError("the times of its frames go back or are missing: encode it again")


class Shown(NamedTuple):
    """The frames that a file shows, in order."""

    frames: np.ndarray  # int [shown], numbers of frames in display order
    ticks: np.ndarray  # int64 [shown], their times


def apply_edits(edits: tuple[Edit, ...], ticks: np.ndarray, tick: Fraction) -> Shown:
    """Return the frames that an edit list shows.

    ticks: int64 [frames], times of all frames in display order. Parts may leave out, repeat and
    reorder frames. The frame that is on the screen where a part begins is shown from there on.
    Raises ValueError for more than MOST_PACKETS.
    """
    if not edits:
        return Shown(np.arange(len(ticks)), ticks)

    frames = []
    shown_at = []
    begin = 0
    count = 0
    for edit in edits:
        length = round(edit.duration / tick)
        if edit.media_time >= 0:
            first = max(int(np.searchsorted(ticks, edit.media_time, "right")) - 1, 0)
            end = len(ticks)
            if length:
                end = int(np.searchsorted(ticks, edit.media_time + length, "left"))
            count += max(end - first, 0)
            if count > MOST_PACKETS:
                raise ValueError(f"an edit list of more than {MOST_PACKETS} frames")
            frames.append(np.arange(first, end))
            shown_at.append(begin + np.maximum(ticks[first:end] - edit.media_time, 0))
        begin += length
    if not count:
        raise ValueError("no frames: its edit list shows none")
    return Shown(np.concatenate(frames), np.concatenate(shown_at))


def _demux(
    container: InputContainer, stream: VideoStream, partial: bool
) -> Iterator["av.Packet[VideoStream]"]:
    """Yield the packets with data.

    Raises ValueError for incomplete ones; `partial` ends there.
    """
    count = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt and partial:
            return
        if packet.is_corrupt:
            raise ValueError(f"damaged or truncated: packet {count} is incomplete")
        count += 1
        if count > MOST_PACKETS:
            raise ValueError(f"more than {MOST_PACKETS} frames")
        yield packet


class Decoded(NamedTuple):
    """A frame, with what it comes from."""

    packet: int  # number of its packet, in decoding order
    frame: av.VideoFrame
    stream: VideoStream
    matrix: bytes | None  # the display matrix, where frames have none of their own


def decode_packets(file: str | io.BytesIO, start: int, partial: bool = False) -> Iterator[Decoded]:
    """Yield the frames in the order of the decoder's output.

    start: number of the packet with which decoding starts. partial: see `read_packets`.
    """
    container, stream = open_video(file)
    with container:
        decoder = decoder_of(stream)
        matrix = None
        for number, packet in enumerate(_demux(container, stream, partial)):
            if number < start:
                continue
            if number == start and decoder is not stream.codec_context:
                matrix = display_matrix(stream, packet)
            packet.pts = number  # the decoder hands it on to the frame
            for frame in decoder.decode(packet):
                yield Decoded(_number(frame), frame, stream, matrix)
        for frame in decoder.decode(None):
            yield Decoded(_number(frame), frame, stream, matrix)


def _number(frame: av.VideoFrame) -> int:
    """Return the number of a frame's packet. Raises ValueError if it has none."""
    if frame.pts is None:
        raise ValueError("the decoder gave a frame without its packet")
    return frame.pts
