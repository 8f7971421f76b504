"""Small videos whose frames show their own number, in many codecs, containers and cuts."""

import dataclasses
import struct
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

HEIGHT, WIDTH = 48, 64
FRAMES = 24
RATE = 25
TILES = 4  # along each side; a tile is one bit of the number, dark or bright
UNEVEN = [i + i // 4 * 2 + (i > 9) for i in range(FRAMES)]  # frames left out, in steps of 1 / RATE


def draw(number: int) -> np.ndarray:
    """Return the frame uint8 [h w 3] of a number: its bits as dark and bright tiles."""
    bits = (number >> np.arange(TILES * TILES) & 1).reshape(TILES, TILES)
    levels = np.where(bits, 210, 40).astype(np.uint8)
    return np.kron(levels, np.ones((HEIGHT // TILES, WIDTH // TILES), np.uint8))[..., None].repeat(
        3, -1
    )


def numbers(frames: np.ndarray) -> list[int]:
    """Return the numbers that frames uint8 [t h w 3] show."""
    tiles = frames.reshape(len(frames), TILES, HEIGHT // TILES, TILES, WIDTH // TILES, 3)
    bits = tiles[:, :, 3:-3, :, 4:-4].mean((2, 4, 5)) > 125
    return [int(n) for n in bits.reshape(len(frames), -1) @ (1 << np.arange(TILES * TILES))]


@dataclasses.dataclass(frozen=True)
class Stream:
    """An encoding of the frames."""

    encoder: str  # FFmpeg's name
    options: Mapping[str, str]
    containers: int  # how many of SUFFIXES can hold it, at least
    pixels: str = "yuv420p"  # the format of pixels
    template: str = "nut"  # a container that can hold it


def x265(parameters: str) -> dict[str, str]:
    return {"x265-params": f"log-level=none:pools=1:frame-threads=1:keyint=8:{parameters}"}


# Encoders by codec and kind of group of frames.
STREAMS = {
    "h264 closed": Stream("libx264", {"g": "8", "bf": "3"}, 10),
    "h264 open": Stream("libx264", {"x264-params": "keyint=8:open-gop=1:bframes=3"}, 10),
    "h264 refresh": Stream("libx264", {"intra-refresh": "1", "g": "8", "bf": "2"}, 10),
    "h264 one group": Stream("libx264", {"g": "99", "bf": "5"}, 10),
    "h264 no B": Stream("libx264", {"g": "8", "bf": "0"}, 10),
    "h264 intra": Stream("libx264", {"g": "1"}, 10),
    "hevc closed": Stream("libx265", x265("open-gop=0:bframes=3"), 8),
    "hevc open": Stream("libx265", x265("open-gop=1:bframes=3"), 8),
    "hevc refresh": Stream("libx265", x265("intra-refresh=1:bframes=0"), 8),
    "mpeg4 B": Stream("mpeg4", {"g": "8", "bf": "2"}, 8),
    "mpeg4 no B": Stream("mpeg4", {"g": "8"}, 8),
    "mpeg2 open": Stream("mpeg2video", {"g": "8", "bf": "2"}, 10),
    "mpeg2 closed": Stream(
        "mpeg2video", {"g": "8", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"}, 10
    ),
    "mpeg1": Stream("mpeg1video", {"g": "8", "bf": "2"}, 7),
    "msmpeg4v3": Stream("msmpeg4", {"g": "8"}, 2),
    "vp8": Stream(
        "libvpx", {"g": "8", "auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}, 2
    ),
    "vp9": Stream("libvpx-vp9", {"g": "8", "lag-in-frames": "8", "cpu-used": "8"}, 5),
    "av1": Stream(
        "libsvtav1", {"g": "8", "preset": "12", "svtav1-params": "lp=1"}, 4, template="matroska"
    ),
    "prores": Stream("prores_ks", {}, 2, "yuv422p10le", "mov"),
    "mjpeg": Stream("mjpeg", {}, 5, "yuvj420p"),
    "ffv1": Stream("ffv1", {"g": "8"}, 2),
    "huffyuv": Stream("huffyuv", {}, 1, "yuv422p"),
    "qtrle": Stream("qtrle", {"g": "8"}, 1, "rgb24", "mov"),
}
SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".m2ts",
)
# Options of the mp4 muxer by layout.
LAYOUTS = {
    "index first": {"movflags": "+faststart"},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
    "a fragment a frame": {"movflags": "frag_every_frame+empty_moov"},
    "dash": {"movflags": "dash+frag_keyframe+empty_moov+default_base_moof+global_sidx"},
    "hybrid": {"movflags": "hybrid_fragmented+frag_keyframe"},
}


FRAGMENTS = "frag_keyframe+delay_moov+default_base_moof"  # with an edit list, places are relative

# Start code and supplemental information "recovery after 0 frames, exactly" (ITU-T H.264, D.1.8).
RECOVERY = bytes((0, 0, 0, 1, 0x06, 0x06, 0x01, 0xC4, 0x80))


def has_encoder(name: str) -> bool:
    """Return true if PyAV has an encoder."""
    try:
        return av.codec.Codec(name, "w").type == "video"
    except (av.codec.codec.UnknownCodecError, ValueError):
        return False


class Packet(NamedTuple):
    """A packet of an encoder; times are in steps of 1 / RATE."""

    data: bytes
    shown_at: int
    decoded_at: int
    is_key: bool


class Encoded(NamedTuple):
    """The numbered frames, encoded."""

    template: Path  # a file with the stream's header
    packets: list[Packet]  # in decoding order

    def keys(self) -> list[tuple[int, int]]:
        """Return (number in decoding order, number of the frame) of the key packets."""
        shown = sorted(packet.shown_at for packet in self.packets)
        return [(n, shown.index(p.shown_at)) for n, p in enumerate(self.packets) if p.is_key]


def encode(stream: Stream, template: Path, times: list[int] | None = None) -> Encoded:
    """Encode the numbered frames, shown at `times` in steps of 1 / RATE."""
    packets = []
    with av.open(str(template), "w", format=stream.template) as out:
        video = out.add_stream(stream.encoder, rate=RATE, options=dict(stream.options))
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, stream.pixels
        video.codec_context.time_base = Fraction(1, RATE)
        video.codec_context.thread_count = 1
        frames = []
        for number, time in enumerate(times or range(FRAMES)):
            frame = av.VideoFrame.from_ndarray(draw(number), "rgb24").reformat(format=stream.pixels)
            frame.pts, frame.time_base = time, Fraction(1, RATE)
            frames.append(frame)
        for frame in (*frames, None):
            for packet in video.encode(frame):
                packets.append(Packet(bytes(packet), packet.pts, packet.dts, packet.is_keyframe))
                out.mux(packet)
    return Encoded(template, packets)


def write(
    encoded: Encoded,
    target: Path,
    mux: Mapping[str, str] | None = None,
    first: int = 0,
    later: int = 0,
) -> bool:
    """Write packets to a container; return false if it does not take the codec.

    first: the first packet, in decoding order. later: added to all times.
    """
    try:
        with (
            av.open(str(encoded.template)) as source,
            av.open(str(target), "w", options=dict(mux or {})) as out,
        ):
            stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
            for row in encoded.packets[first:]:
                packet = av.Packet(row.data)
                packet.pts, packet.dts = row.shown_at + later, row.decoded_at + later
                packet.duration, packet.time_base = 1, Fraction(1, RATE)
                packet.is_keyframe, packet.stream = row.is_key, stream
                out.mux(packet)
    except (av.error.FFmpegError, ValueError):
        target.unlink(missing_ok=True)
        return False
    return True


def edit(path: Path, parts: Iterable[tuple[int, int]]) -> None:
    """Make the edit list of an mp4 show parts of (first frame, frames), as editors of phones do.

    The index of packets must stand at the end of the file.
    """
    data = bytearray(path.read_bytes())
    at, movie, media = data.find(b"elst"), data.find(b"mvhd"), data.find(b"mdhd")
    movie_rate, media_rate = (
        struct.unpack(">I", data[at + 16 : at + 20])[0] for at in (movie, media)
    )
    size, _, _, count, _, start = struct.unpack(">I4s4sIIi", data[at - 4 : at + 20])
    rows = [
        struct.pack(
            ">IiI", movie_rate * frames // RATE, start + begin * media_rate // RATE, 1 << 16
        )
        for begin, frames in parts
    ]
    body = struct.pack(">4sII", b"elst", 0, len(rows)) + b"".join(rows)

    data[at : at - 4 + size] = body
    boxes = [at - 4, *(data.rfind(name, 0, at) - 4 for name in (b"edts", b"trak", b"moov"))]
    for box in boxes:
        (length,) = struct.unpack(">I", data[box : box + 4])
        data[box : box + 4] = struct.pack(">I", length + 12 * (len(rows) - count))
    path.write_bytes(data)


class Variant(NamedTuple):
    """A file of the grid, and what it shows."""

    path: Path
    frames: list[int]  # numbers of the frames
    times: list[float]  # seconds, when they are shown


def _seconds(steps: Iterable[int]) -> list[float]:
    steps = list(steps)
    return [(step - steps[0]) / RATE for step in steps]


def containers(encoded: Encoded, folder: Path) -> Iterator[Variant]:
    """Yield the frames in every container, in capitals too, and every layout of mp4."""
    layouts = [(f"plain{suffix}", {}) for suffix in SUFFIXES]
    layouts += [(f"{name}.MP4", mux) for name, mux in LAYOUTS.items()]
    for name, mux in layouts:
        if write(encoded, folder / name, mux):
            yield Variant(folder / name, [*range(FRAMES)], _seconds(range(FRAMES)))


def marked(encoded: Encoded, folder: Path) -> Iterator[Variant]:
    """Yield files that call every packet a key packet, as some recorders do.

    Those of H.264 call it a point of recovery inside the stream too.
    """
    with av.open(str(encoded.template)) as source:
        is_h264 = source.streams.video[0].codec_context.name == "h264"
    claim = RECOVERY if is_h264 else b""
    keys = [
        packet if packet.is_key else packet._replace(data=claim + packet.data, is_key=True)
        for packet in encoded.packets
    ]
    for suffix in (".mp4", ".mkv", ".avi"):
        path = folder / f"marked{suffix}"
        if write(encoded._replace(packets=keys), path):
            yield Variant(path, [*range(FRAMES)], _seconds(range(FRAMES)))


def uneven(encoded: Encoded, folder: Path) -> Iterator[Variant]:
    """Yield frames that start late, and of which some were left out, in containers with times."""
    for suffix in (".mp4", ".mov", ".mkv", ".webm", ".ts"):
        path = folder / f"uneven{suffix}"
        if write(encoded, path, later=150):
            yield Variant(path, [*range(FRAMES)], _seconds(UNEVEN))


def cuts(encoded: Encoded, folder: Path) -> Iterator[Variant]:
    """Yield copies of the packets from a later one on: from key frames, and from between two."""
    for key, shown in encoded.keys()[1:3]:
        places = [(key, suffix) for suffix in (".mp4", ".mkv", ".ts", ".avi", ".mpg")]
        places += [(key - 2, suffix) for suffix in (".ts", ".mpg", ".avi")]
        for first, suffix in places:
            path = folder / f"from {first}{suffix}"
            # An AVI fills the time before a late start with empty packets.
            later = 50 if suffix != ".avi" else -encoded.packets[max(first, 0)].decoded_at
            if first > 0 and write(encoded, path, first=first, later=later):
                frames = range(shown, FRAMES)
                yield Variant(path, [*frames], _seconds(frames))


# Parts (first frame, frames) that an edit list shows: one, with a gap, repeated, in reverse order.
EDITS = (
    [(1, 9)],
    [(7, 8)],
    [(9, 15)],
    [(13, 4)],
    [(2, 5), (13, 9)],
    [(10, 6), (10, 6)],
    [(17, 7), (4, 8)],
)


def edits(encoded: Encoded, folder: Path) -> Iterator[Variant]:
    """Yield mp4 files with an edit list that shows parts of the frames."""
    for parts in EDITS:
        frames = [begin + n for begin, count in parts for n in range(count)]
        for name, mux in (("whole.mp4", {}), ("fragments.mov", {"movflags": FRAGMENTS})):
            path = folder / f"{parts} {name}"
            if write(encoded, path, mux):
                edit(path, parts)
                yield Variant(path, frames, _seconds(range(len(frames))))
