"""Folders of videos: captions that stay with their clips, splits, planted faults."""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from tests.data.test_video_files import level, make_clip, noise_clip
from vdx.config.build import ConfigError, build
from vdx.data import sources
from vdx.data.record import BadRecord
from vdx.data.records import CLASS_KEYS
from vdx.data.sources import SOURCES, Records, VideoFolder

REAL = Path(__file__).parents[3] / "shared" / "data"


def listed(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_captions_stay_with_their_clips_and_splits_partition(tmp_path):
    names = [f"{i:02d}.mp4" for i in range(12)]
    for i, name in enumerate(names):
        make_clip(tmp_path / name, [0.0, 0.1], [20 * i, 20 * i])
    rows = [{"file_name": n, "caption": str(20 * i), "fps": 3} for i, n in enumerate(names)]
    parts = [
        VideoFolder(listed(tmp_path, rows), split, validation_fraction=0.3)
        for split in ("all", "train", "validation")
    ]
    for folder in parts:
        for i in range(len(folder)):
            found = level(folder[i].read(np.zeros(1)))[0]
            assert abs(found - float(folder[i].caption)) <= 2
    whole, train, validation = ({r.name for r in part.rows} for part in parts)
    assert train | validation == whole and not train & validation and train and validation
    # A clip stays on its side when others come or go.
    fewer = VideoFolder(listed(tmp_path, rows[::2]), "validation", validation_fraction=0.3)
    assert {r.name for r in fewer.rows} == validation & set(names[::2])


def test_text_files_of_the_same_name_are_captions(tmp_path):
    (tmp_path / "sub").mkdir()
    make_clip(tmp_path / "sub" / "a.mp4", [0.0, 0.1])
    make_clip(tmp_path / "b.mp4", [0.0, 0.1])
    (tmp_path / "sub" / "a.txt").write_text("ein grauer Würfel\n", encoding="utf-8")
    folder = VideoFolder(str(tmp_path))
    assert [r.name for r in folder.rows] == ["sub/a.mp4"]
    assert folder[0].caption == "ein grauer Würfel"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "No videos with captions in .*looked for"),
        (
            '{"file_name": "a.mp4"}\n{oops\n',
            "line 2 cannot be read as JSON: Expecting property name",
        ),
        ('{"file_name": "a.mp4", "file_name": "b.mp4"}\n', "line 1 .*'file_name' stands twice"),
        ('{"file_name": "a.mp4", "score": NaN}\n', "line 1 cannot be read as JSON: NaN is no"),
        ('{"file_name": "a.mp4", "score": 1e999}\n', "line 1 .* '1e999' is too large"),
        (f'{{"file_name": "a.mp4", "id": {10**30}}}\n', "line 1 .*more than 64 bits"),
        ("[" * 100_000, "line 1 .*nested more than 64 deep"),
        (
            f'{{"file_name": "a.mp4", "sha256": "{"0" * 65}"}}\n',
            "line 1: \"sha256\" is '0+', expected 64",
        ),
        ('{"caption": "x"}\n', 'line 1 has no "file_name"'),
        ('{"file_name": ""}\n', 'line 1 has no "file_name"'),
        ("[1]\n", 'line 1 has no "file_name"'),
        ('{"file_name": "a.mp4", "sha256": "ABC"}\n', "line 1: \"sha256\" is 'ABC', expected 64"),
    ],
)
def test_a_data_set_that_is_not_valid_is_refused(tmp_path, text, message):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        VideoFolder(str(tmp_path))


def test_missing_places_and_splits_are_named(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        VideoFolder(str(tmp_path / "no"))
    with pytest.raises(ValueError, match="looked for"):
        VideoFolder(str(tmp_path))
    listed(tmp_path, [{"file_name": "a.mp4", "caption": "a"}])
    with pytest.raises(ValueError, match="none of all, train, validation"):
        VideoFolder(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"1 videos with captions, .* leaves none for validation"):
        VideoFolder(str(tmp_path), "validation", validation_fraction=0.0)
    with pytest.raises(ValueError, match=r"holds no features\.json"):
        Records(str(tmp_path))
    with pytest.raises(ConfigError, match="unknown name"):
        build({"name": "folders"}, SOURCES, "source")


def flipped(data):
    """Return the file with the middle half of its payload inverted.

    A few flipped bytes may decode to other pixels without an error, in any decoder. Records have
    checksums against that, files do not.
    """
    begin, size = data.index(b"mdat"), len(data) - data.index(b"mdat")
    middle = slice(begin + size // 4, begin + 3 * size // 4)
    return data[: middle.start] + bytes(255 - b for b in data[middle]) + data[middle.stop :]


def without_picture(path):
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize(
    "fault, reason",
    [
        (flipped, "damaged frame|Invalid data"),
        (lambda d: d[: len(d) * 2 // 3], "truncated|Invalid"),
        (lambda d: b"", "Invalid data"),
        (lambda d: b"this is no video\n" * 9, "Invalid data"),
        (None, "No such file"),
        (without_picture, "no video stream"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_bad_record(tmp_path, fault, reason):
    data = noise_clip(tmp_path / "good.mp4")
    if fault is without_picture:
        without_picture(tmp_path / "bad.mp4")
    elif fault:
        (tmp_path / "bad.mp4").write_bytes(fault(data))
    folder = VideoFolder(listed(tmp_path, [{"file_name": "bad.mp4", "caption": "x"}]))
    with pytest.raises(BadRecord, match=f"bad.mp4: not a usable video: .*({reason})"):
        folder[0].read(np.arange(10) / 10)


def test_a_video_that_differs_from_its_checksum_is_a_bad_record(tmp_path):
    path = tmp_path / "a.mp4"
    make_clip(path, [0.0, 0.1])
    row = {"file_name": "a.mp4", "caption": "x"}
    row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = VideoFolder(listed(tmp_path, [row]))
    assert len(folder[0].timestamps) == 2
    make_clip(path, [0.0, 0.2])
    with pytest.raises(BadRecord, match=r"its SHA-256 is .*metadata\.jsonl says"):
        folder[0]


def test_pipes_in_the_place_of_videos_and_tracks_are_bad_records(tmp_path):
    """FFmpeg would wait for somebody who writes into them."""
    make_clip(tmp_path / "a.mp4", [0.0, 0.1])
    for name in ("b.mp4", "pose.mp4"):
        os.mkfifo(tmp_path / name)
    rows = [
        {"file_name": "a.mp4", "caption": "x", "pose": "pose.mp4"},
        {"file_name": "b.mp4", "caption": "x"},
    ]
    folder = VideoFolder(listed(tmp_path, rows))
    with pytest.raises(BadRecord, match=r"pose 'pose\.mp4': .*is a pipe"):
        folder[0].tracks["pose"](np.zeros(1))
    with pytest.raises(BadRecord, match=r"b\.mp4 is a pipe"):
        folder[1]


@pytest.mark.parametrize("track", ["../depth.npy", "/etc/depth.npy", 3])
def test_a_track_outside_the_folder_is_a_bad_record(tmp_path, track):
    root = tmp_path / "clips"
    root.mkdir()
    make_clip(root / "a.mp4", [0.0, 0.1])
    np.save(tmp_path / "depth.npy", np.zeros((2, 32, 48)))
    folder = VideoFolder(listed(root, [{"file_name": "a.mp4", "caption": "x", "depth": track}]))
    with pytest.raises(BadRecord, match="expected the name of a file inside the folder"):
        folder[0].tracks["depth"](np.zeros(1))


def test_surveys_of_captions_are_bounded(tmp_path, monkeypatch):
    rows = [{"file_name": f"{i}.mp4", "caption": str(i)} for i in range(5)]
    monkeypatch.setattr(sources, "FOLDER_SURVEYED", 2)
    assert list(VideoFolder(listed(tmp_path, rows)).captions()) == ["0", "1"]

    monkeypatch.setattr(sources, "RECORDS_SURVEYED", 3)
    records = object.__new__(Records)
    for name, value in {"path": "p", "split": "train"}.items():
        object.__setattr__(records, name, value)
    rows = [{"caption": row["caption"].encode()} for row in rows]
    object.__setattr__(records, "rows", rows)
    assert list(records.captions()) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("features", "split", "reason"),
    [
        (("video", "caption"), "test", "has no split 'test'; it has train"),
        (("video",), "train", "has the features video; expected video and caption"),
        (("latents", "caption"), "train", "has the features caption, latents; expected"),
        (("latents", "text"), "train", None),
        (("video", "caption", "key"), "train", None),
    ],
)
def test_prepared_directories_that_are_refused(tmp_path, monkeypatch, features, split, reason):
    info = SimpleNamespace(splits={"train": 1}, features=dict.fromkeys(features), metadata=None)
    builder = SimpleNamespace(info=info, as_data_source=lambda split: [split])
    tfds = SimpleNamespace(builder_from_directory=lambda path: builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    (tmp_path / "features.json").write_text("{}")
    if reason is None:
        records = Records(str(tmp_path), split)
        assert len(records) == 1
        before = records.file_stamps()
        (tmp_path / "features.json").write_text("{ }")
        assert records.file_stamps() != before
        return
    with pytest.raises(ValueError, match=reason):
        Records(str(tmp_path), split)


@pytest.mark.parametrize(
    "file, key", [(file, key) for file, keys in CLASS_KEYS.items() for key in sorted(keys)]
)
def test_a_prepared_directory_that_names_a_class_is_refused_before_tfds_reads_it(
    tmp_path, monkeypatch, file, key
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # importing it raises
    (tmp_path / "features.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"a": [{key: "os.system"}]}))
    with pytest.raises(ValueError, match=rf"{file} names the class 'os\.system'"):
        Records(str(tmp_path))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"caption": 3}, "caption is int, expected text"),
        ({"caption": "a cat \ud83d"}, "character 7 is U.D83D, half of a surrogate pair"),
    ],
)
def test_a_caption_that_is_no_text_is_a_bad_record(tmp_path, row, reason):
    make_clip(tmp_path / "a.mp4", [0.0, 0.1])
    with pytest.raises(BadRecord, match=reason):
        VideoFolder(listed(tmp_path, [{"file_name": "a.mp4", **row}]))[0]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/a.mp4",
        "../a.mp4",
        "a/../../a.mp4",
        "..",
        "a\\..\\b.mp4",
        "\\\\host\\a.mp4",
        "C:/a.mp4",
        "c:a.mp4",
        "a.mp4\0.txt",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"line 1: .* leaves the folder"):
        VideoFolder(listed(tmp_path, [{"file_name": name, "caption": "x"}]))


@pytest.mark.skipif(not (REAL / "fluent_emoji").exists(), reason=f"{REAL} is not on this machine")
def test_real_clips_have_the_frames_their_list_promises():
    folder = REAL / "fluent_emoji"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    source = build({"name": "folder", "path": str(folder)}, SOURCES, "source")
    assert len(source) == len(rows) == 300
    for i in range(0, 300, 23):
        record = source[i]
        assert record.key == rows[i]["file_name"] and record.caption == rows[i]["caption"]
        expected = np.arange(rows[i]["num_frames"]) / rows[i]["fps"]
        np.testing.assert_allclose(record.timestamps, expected, atol=1e-4)
        assert record.read(record.timestamps).shape == (len(expected), 64, 64, 3)
