"""Packets of encoded video: their times and the display order of frames."""

import array
import io
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from vdx.data.containers import MOST_PACKETS, open_video
from vdx.data.display import decoder_of

__all__ = ["Decoded", "Packets", "decode_packets", "display_times", "output_order", "read_packets"]

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
    is_discard: np.ndarray  # bool [packets], only prepares the decoder for others
    tick: float  # seconds
    shown_as_stamped: bool  # each packet is one frame, shown at the time that it states

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
            rows.extend((*times, packet.duration or 0, packet.is_keyframe, packet.is_discard))
        if stream.time_base is None:
            raise ValueError("a video stream without a time base")
        tick = float(stream.time_base)
        codec = stream.codec_context.codec
        name = container.format.name
    if not rows:
        raise ValueError("no frames")
    if name.startswith("mov") and codec.canonical_name == "mpeg1video":
        # FFmpeg applies neither edit lists nor cuts to it.
        raise ValueError("MPEG-1 in an mp4 has no certain order of frames: store it as .mpg")

    shown_at, decoded_at, durations, is_key, is_discard = np.array(rows).reshape(-1, 5).T
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
        is_discard.astype(bool),
        tick,
        shown_as_stamped=bool(starts_clean and unique and simple),
    )


def output_order(file: str | io.BytesIO, start: int, partial: bool = False) -> np.ndarray:
    """Return the packet of each frame in display order, int [frames]; decodes all."""
    numbers: list[int] = []
    for packet, frame, _ in decode_packets(file, start, partial):
        if not frame.is_corrupt:
            numbers.append(packet)
        elif partial and numbers:
            break
        elif numbers or packet == start:  # others are shown before the first key frame
            raise ValueError("damaged frame")
    return np.array(numbers, int)


def display_times(packets: Packets, numbers: np.ndarray) -> np.ndarray:
    """Return the times of frames in display order, int64 [frames] ticks.

    Raises ValueError if the times of the packets contradict the order.
    """
    shown_at = packets.shown_at[numbers]
    if shown_at.min() > NO_TIME and np.all(np.diff(shown_at) >= 0):
        return shown_at

    # Old containers state when packets are decoded: at the rate at which frames are shown.
    decoded_at = packets.decoded_at
    if decoded_at.min() > NO_TIME and np.all(np.diff(decoded_at) > 0):
        return np.sort(decoded_at[numbers])
    raise ValueError("the times of its frames go back or are missing: encode it again")


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


def decode_packets(file: str | io.BytesIO, start: int, partial: bool = False) -> Iterator[Decoded]:
    """Yield the frames in the order of the decoder's output.

    start: number of the packet with which decoding starts. partial: see `read_packets`.
    """
    container, stream = open_video(file)
    with container:
        decoder = decoder_of(stream)
        for number, packet in enumerate(_demux(container, stream, partial)):
            if number < start:
                continue
            packet.pts = number  # the decoder hands it on to the frame
            for frame in decoder.decode(packet):
                yield Decoded(_number(frame), frame, stream)
        for frame in decoder.decode(None):
            yield Decoded(_number(frame), frame, stream)


def _number(frame: av.VideoFrame) -> int:
    """Return the number of a frame's packet. Raises ValueError if it has none."""
    if frame.pts is None:
        raise ValueError("the decoder gave a frame without its packet")
    return frame.pts
