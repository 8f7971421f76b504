"""One decode of a file: its row, its cells, and what is left of damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest

from vdx.data.curation.look import Look, LookSettings, look
from vdx.data.curation.table import MEASURES
from vdx.data.video_files import open_footage
from vdx.generate.video_io import write_video

SETTINGS = LookSettings()
FRAMES = 60
FPS = 24


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A clip of noise whose second half is twice as bright."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 100, (FRAMES, 96, 160, 3)).astype(np.uint8)
    frames[FRAMES // 2 :] += 100
    path = tmp_path_factory.mktemp("look") / "a.mp4"
    write_video(path, frames, FPS, min_side=16)
    return path


def test_all_frames_are_those_that_are_read_one_by_one(clip):
    opener = lambda: str(clip)
    footage = open_footage(opener)
    found = list(footage.all_frames(opener))
    assert [frame.number for frame in found] == list(range(FRAMES))
    for number in (0, 31, 59):
        ((_, pixels),) = footage.frames(opener, [number])
        assert np.array_equal(pixels, found[number].pixels)
    assert all(5 < frame.quantiser < 40 for frame in found)


def test_row_and_cells(clip):
    found = look(clip, SETTINGS)
    row = found.source
    assert (row["verdict"], row["reasons"]) == ("ok", [])
    assert (row["frames"], row["width"], row["height"]) == (FRAMES, 160, 96)
    assert row["fps"] == pytest.approx(FPS)
    assert row["duration"] == pytest.approx(FRAMES / FPS)
    assert (row["codec"], row["audio"], row["variable_rate"]) == ("h264", False, False)
    assert set(found.cells) == {"start", "end", *MEASURES}
    assert found.cells["start"] == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert found.cells["end"] == pytest.approx([0.5, 1, 1.5, 2, 2.5])
    assert found.cells["brightness"][0] == pytest.approx(50, abs=3)
    assert found.cells["brightness"][4] == pytest.approx(150, abs=3)
    assert Look.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_a_truncated_file_is_measured_as_far_as_it_reads(clip, tmp_path, share):
    data = clip.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(share * len(data))])  # its index comes first
    found = look(path, SETTINGS)
    assert found.source["verdict"] == "partial"
    assert found.source["reasons"][0] == "truncated"
    assert 0 < len(found.cells["start"]) <= 5
    whole = look(clip, SETTINGS)
    assert found.cells["brightness"][0] == whole.cells["brightness"][0]


@pytest.mark.parametrize("content", [b"", b"no video", b"RIFF0000WEBP"])
def test_a_file_that_is_no_video_is_dropped(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    found = look(path, SETTINGS)
    assert found.source["verdict"] == "drop"
    assert found.source["reasons"] and not found.cells["start"]
