"""The law of the reader: any frame by random access is the frame in display order.

The oracle is the number that each frame shows.
"""

import re

import numpy as np
import pytest

from tests.data import video_grid as grid
from vdx.data.record import BadRecord
from vdx.data.video_files import VIDEOS, video_record

RANDOM_WINDOWS = 4
MPEG = (".mpg", ".mpeg", ".ts", ".mts", ".m2ts")
UNUSABLE = "known codec|an unknown codec|frames of unknown size|Invalid data"
CUTS = 12  # places where a file is cut
# Streams of the default suite: of what people have most, and of each way of reordering frames.
REORDERED = ("h264 open", "hevc open", "mpeg2 open", "h264 refresh")
MISMARKED = ("h264 no B", "mpeg4 B")
COMMON = (*REORDERED, "h264 closed", "mpeg4 B", "vp9", "av1", "vp8", "mjpeg", "prores")
ENCODERS = {row.encoder for row in grid.STREAMS.values()}


def open_record(path):
    return video_record(path.name, "", lambda: str(path))


def faults(variant, starts_late=False):
    """Return where a file breaks the law: [(file, what)].

    starts_late: a cut stream without whole key frames is only shown once it is complete.
    """
    record = open_record(variant.path)
    stamps = record.timestamps
    whole = record.read(stamps)
    found = grid.numbers(whole)
    begin = len(variant.frames) - len(found) if starts_late else 0
    if not found or found != variant.frames[begin:]:
        return [(variant.path.name, f"shows {found}, expected {variant.frames}")]
    times = np.subtract(variant.times[begin:], variant.times[begin])
    wrong = []
    if np.abs(stamps - times).max() > 2e-3 or not record.duration > stamps[-1]:
        wrong.append((variant.path.name, f"times {stamps}"))

    # Every frame alone, and windows.
    rng = np.random.default_rng(0)
    windows = [[number] for number in range(len(stamps))]
    windows += [np.sort(rng.integers(len(stamps), size=5)) for _ in range(RANDOM_WINDOWS)]
    for window in windows:
        if (record.read(stamps[window]) != whole[window]).any():
            wrong.append((variant.path.name, f"frames {window}"))
    return wrong


def check_all(variants, least, starts_late=False):
    """Assert that at least `least` files follow the law, and print how many there are.

    FFmpeg's muxers of MPEG take streams that they write without header or name of the codec. No
    reader can use these.
    """
    wrong, refused, count = [], 0, 0
    for variant in variants:
        try:
            wrong += faults(variant, starts_late)
            count += 1
        except BadRecord as error:
            refused += 1
            unusable = variant.path.suffix in MPEG and re.search(UNUSABLE, error.reason)
            if not unusable and "MPEG-1 in an mp4" not in error.reason:
                wrong.append((variant.path.name, str(error)))
    print(f"grid: {count} files, {refused} refused")
    assert not wrong, wrong
    assert count >= least


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Return a function (name of a stream, times) -> its packets, encoded once."""
    cache = {}

    def encode(name, times=None):
        row = grid.STREAMS[name]
        if not grid.has_encoder(row.encoder):
            pytest.skip(f"no encoder {row.encoder}")
        key = (name, times is None)
        if key not in cache:
            cache[key] = grid.encode(row, tmp_path_factory.mktemp("grid") / "template", times)
        return cache[key]

    return encode


def test_most_encoders_of_the_grid_exist():
    assert sum(map(grid.has_encoder, ENCODERS)) >= 10, ENCODERS
    assert set(grid.SUFFIXES) <= set(VIDEOS)


def streams(kind):
    """Return the names of the streams as parameters; those outside of `kind` are slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=[] if name in kind else slow) for name in grid.STREAMS]


@pytest.mark.parametrize("name", streams(COMMON))
def test_frames_alone_and_in_windows_in_every_container(name, encoded, tmp_path):
    check_all(grid.containers(encoded(name), tmp_path), grid.STREAMS[name].containers)


@pytest.mark.parametrize("name", streams(MISMARKED))
def test_packets_that_are_wrongly_marked_as_keys(name, encoded, tmp_path):
    check_all(grid.marked(encoded(name), tmp_path), 0)


@pytest.mark.parametrize("name", streams(REORDERED))
def test_frames_that_start_late_and_are_unevenly_spaced(name, encoded, tmp_path):
    timed = name != "huffyuv"  # which FFmpeg writes into AVI only
    check_all(grid.uneven(encoded(name, grid.UNEVEN), tmp_path), int(timed))


@pytest.mark.parametrize("name", streams(REORDERED))
def test_copied_cuts_show_what_players_show(name, encoded, tmp_path):
    variants = grid.cuts(encoded(name), tmp_path)
    check_all(variants, 0, starts_late="refresh" in name)


@pytest.mark.parametrize("name", streams(REORDERED))
def test_edit_lists_show_what_players_show(name, encoded, tmp_path):
    check_all(grid.edits(encoded(name), tmp_path), 0)
