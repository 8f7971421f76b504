"""Statements of an mp4 or mov that FFmpeg does not apply, or not exactly.

Edit lists name the parts of a track that are shown. FFmpeg starts to decode at their beginning,
also where the stream has no whole key frame, and misplaces the frames of a second part. The clean
aperture is the part of the frame that is shown (ISO/IEC 14496-12, 8.6.6 and 12.1.4).
"""

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO, NamedTuple

__all__ = ["Aperture", "Edit", "Track", "read_track"]

MOST_BODY = 1 << 16  # bytes of a box that is read as a whole
SAMPLE_ENTRY = 78  # bytes of a visual sample entry before its boxes
UNITY = 1 << 16  # the rate of an edit at normal speed, in 16.16


class Edit(NamedTuple):
    """A part of a track, shown after the ones before it."""

    duration: Fraction  # seconds; 0 in the last one: to the end
    media_time: int  # ticks of the track's own clock; -1: nothing is shown


class Aperture(NamedTuple):
    """The part of the frame that is shown."""

    size: tuple[Fraction, Fraction]  # width, height, in pixels
    offset: tuple[Fraction, Fraction]  # of its centre from that of the frame, right and down


class Track(NamedTuple):
    """The statements of an mp4's header on a track."""

    edits: tuple[Edit, ...]  # none: the whole track is shown
    aperture: Aperture | None


class Box(NamedTuple):
    """A box: its name, and where its body is in the file."""

    name: bytes
    begin: int
    end: int


def read_track(file: BinaryIO, number: int) -> Track:
    """Return the statements on the track of a number. Raises ValueError."""
    size = file.seek(0, 2)
    for movie in _named(file, Box(b"", 0, size), b"moov"):
        for track in _named(file, movie, b"trak"):
            if _track_number(file, track) == number:
                return Track(_edits(file, movie, track), _aperture(file, track))
    raise ValueError(f"a header without track {number}, or a compressed one: copy it to a new mp4")


def _boxes(file: BinaryIO, parent: Box, skip: int = 0) -> Iterator[Box]:
    """Yield the boxes in the body of another, after its first `skip` bytes."""
    begin = parent.begin + skip
    while begin + 8 <= parent.end:
        file.seek(begin)
        header = file.read(16)
        length, body = int.from_bytes(header[:4]), begin + 8
        if length == 1:  # the length follows, in 64 bits
            length, body = int.from_bytes(header[8:16]), begin + 16
        if length == 0:  # to the end
            length = parent.end - begin
        if length < body - begin:
            return
        yield Box(header[4:8], body, min(begin + length, parent.end))
        begin += length


def _named(file: BinaryIO, parent: Box, *path: bytes) -> Iterator[Box]:
    """Yield the boxes at a path of names below another."""
    for box in _boxes(file, parent):
        if box.name == path[0]:
            if len(path) == 1:
                yield box
            else:
                yield from _named(file, box, *path[1:])


def _body(file: BinaryIO, box: Box) -> bytes:
    """Return the bytes of a box. Raises ValueError if they are too many."""
    if box.end - box.begin > MOST_BODY:
        raise ValueError(f"a box {box.name!r} of more than {MOST_BODY} bytes")
    file.seek(box.begin)
    return file.read(box.end - box.begin)


def _unpack(layout: str, body: bytes, place: int) -> tuple[int, ...]:
    """Return the numbers at a place of a box. Raises ValueError if it is too short."""
    if len(body) < place + struct.calcsize(layout):
        raise ValueError("a box of the header is too short")
    return struct.unpack_from(layout, body, place)


def _clock(body: bytes) -> int:
    """Return the number that follows the two dates of a header box."""
    is_long = body[:1] == b"\x01"
    return _unpack(">I", body, 20 if is_long else 12)[0]


def _track_number(file: BinaryIO, track: Box) -> int:
    """Return the number of a track; 0 if it states none."""
    for header in _named(file, track, b"tkhd"):
        return _clock(_body(file, header))
    return 0


def _edits(file: BinaryIO, movie: Box, track: Box) -> tuple[Edit, ...]:
    """Return the edit list of a track."""
    rates = [_clock(_body(file, box)) for box in _named(file, movie, b"mvhd")]
    lists = [_body(file, box) for box in _named(file, track, b"edts", b"elst")]
    if not lists:
        return ()
    if not rates or not rates[0]:
        raise ValueError("an edit list without a clock")

    body = lists[0]
    row = ">QqI" if body[:1] == b"\x01" else ">IiI"
    (count,) = _unpack(">I", body, 4)
    edits = []
    for number in range(count):
        duration, media_time, rate = _unpack(row, body, 8 + number * struct.calcsize(row))
        if media_time >= 0 and rate != UNITY:
            raise ValueError(f"an edit list that plays at {rate / UNITY:g} of the speed")
        edits.append(Edit(Fraction(duration, rates[0]), media_time))
    return tuple(edits)


def _aperture(file: BinaryIO, track: Box) -> Aperture | None:
    """Return the clean aperture of a track. Raises ValueError if it means nothing."""
    for entries in _named(file, track, b"mdia", b"minf", b"stbl", b"stsd"):
        for entry in _boxes(file, entries, skip=8):
            for box in _boxes(file, entry, skip=SAMPLE_ENTRY):
                if box.name == b"clap":
                    return _parse_aperture(_body(file, box))
    return None


def _parse_aperture(body: bytes) -> Aperture:
    """Return the clean aperture that a box `clap` states. Raises ValueError."""
    numbers = _unpack(">IIIIiIiI", body, 0)
    if 0 in numbers[1::2]:
        raise ValueError("a clean aperture with a denominator of 0")
    width, height, right, down = map(Fraction, numbers[::2], numbers[1::2])
    return Aperture((width, height), (right, down))
