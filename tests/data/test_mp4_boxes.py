"""Boxes of an mp4 that are read without FFmpeg."""

import io
import struct
from fractions import Fraction

import pytest

from vdx.data.mp4_boxes import Aperture, Edit, read_track


def box(name, *parts):
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def header(name, version, number):
    """Return a box whose dates come before a number, in version 0 or 1."""
    return box(name, bytes((version, 0, 0, 0)), bytes((8, 16)[version]), struct.pack(">I", number))


def movie(version=0, edits=(), clap=b"", rate=1 << 16):
    """Return an mp4 of two tracks; the statements are on the second, of number 7."""
    row = (">IiI", ">QqI")[version]
    rows = [struct.pack(row, *edit, rate) for edit in edits]
    elst = box(b"elst", bytes((version, 0, 0, 0)), struct.pack(">I", len(rows)), *rows)
    entry = box(b"avc1", bytes(78), box(b"avcC", bytes(7)), clap)
    stsd = box(b"stsd", bytes(8), entry)
    media = box(b"mdia", box(b"minf", box(b"stbl", stsd)))
    tracks = [
        box(b"trak", header(b"tkhd", version, 1), box(b"edts", box(b"elst", bytes(8)))),
        box(b"trak", header(b"tkhd", version, 7), box(b"edts", elst), media),
    ]
    moov = box(b"moov", header(b"mvhd", version, 600), *tracks)
    long = struct.pack(">I4sQ", 1, b"mdat", 16 + 5) + bytes(5)
    return io.BytesIO(box(b"ftyp", b"isom") + long + moov)


@pytest.mark.parametrize("version", [0, 1])
def test_edits_of_the_track_are_read(version):
    file = movie(version, [(300, -1), (1200, 90_000), (0, 5)])
    expected = (Edit(Fraction(1, 2), -1), Edit(Fraction(2), 90_000), Edit(Fraction(0), 5))
    assert read_track(file, 7).edits == expected
    assert read_track(file, 1).edits == () and read_track(file, 1).aperture is None


def test_the_clean_aperture_of_the_track_is_read():
    clap = box(b"clap", struct.pack(">IIIIiIiI", 41472, 59, 576, 1, -3, 2, 0, 1))
    expected = Aperture((Fraction(41472, 59), Fraction(576)), (Fraction(-3, 2), Fraction(0)))
    assert read_track(movie(clap=clap), 7).aperture == expected


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (movie(edits=[(1, 0)], rate=2 << 16), "an edit list that plays at 2 of the speed"),
        (movie(clap=box(b"clap", bytes(32))), "a denominator of 0"),
        (movie(clap=box(b"clap", bytes(31))), "a box of the header is too short"),
        (io.BytesIO(box(b"moov", box(b"cmov", bytes(9)))), "a header without track 7"),
        (io.BytesIO(struct.pack(">I4s", 0, b"moov")), "a header without track 7"),
    ],
)
def test_what_means_nothing_is_refused(file, message):
    with pytest.raises(ValueError, match=message):
        read_track(file, 7)
