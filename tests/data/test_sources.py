"""Folders of videos: real timestamps, captions that stay with their clips, planted faults."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vdx.config.build import ConfigError, build
from vdx.data.record import BadRecord
from vdx.data.sources import SOURCES, Records, VideoFolder
from vdx.data.video_files import video_record
from vdx.generate.video_io import write_video

REAL = Path(__file__).parents[3] / "shared" / "data"
UNEVEN = [0.0, 0.1, 0.15, 0.4, 1.0, 1.04, 1.5]  # seconds; a variable frame rate


def make_clip(path, stamps, levels=None, gop=12):
    """Write a video of flat grey frames, shown at `stamps` seconds."""
    levels = range(10, 10 + 20 * len(stamps), 20) if levels is None else levels
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=1000, options={"crf": "1", "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp, level in zip(stamps, levels, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), level, np.uint8), "rgb24")
            frame.pts, frame.time_base = round(stamp * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return str(path)


def level(frames):
    return frames.mean((1, 2, 3))


def listed(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_timestamps_are_the_ones_written(tmp_path, name):
    path = make_clip(tmp_path / name, UNEVEN)
    record = video_record("a", "grey", lambda: path)
    np.testing.assert_allclose(record.timestamps, UNEVEN, atol=1e-9)
    assert 1.5 <= record.duration < 2.5
    np.testing.assert_allclose(level(record.read(record.timestamps)), range(10, 150, 20), atol=2)


def test_read_gives_the_frame_that_is_shown_at_each_time(tmp_path):
    path = make_clip(tmp_path / "a.mp4", UNEVEN)
    frames = video_record("a", "grey", lambda: path).read(
        np.array([0.0, 0.09, 0.0999, 0.39, 0.99, 1.039, 1.04, 9.0])
    )
    expected = [10, 10, 30, 50, 70, 90, 110, 130]
    np.testing.assert_allclose(level(frames), expected, atol=2)
    assert frames.dtype == np.uint8 and frames.shape == (8, 32, 48, 3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_reading_in_the_middle_equals_reading_from_the_start(tmp_path, name):
    path = make_clip(tmp_path / name, np.arange(40) / 10, range(5, 245, 6), gop=8)
    record = video_record("a", "grey", lambda: path)
    whole = record.read(record.timestamps)
    for begin in (0, 7, 8, 9, 23, 38):
        part = record.read(record.timestamps[begin : begin + 2])
        np.testing.assert_array_equal(part, whole[begin : begin + 2])


def test_a_turned_phone_video_is_upright(tmp_path):
    path = Path(make_clip(tmp_path / "a.mp4", [0.0, 0.1]))
    data = path.read_bytes()
    plain = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    track = data.index(b"tkhd")
    path.write_bytes(data[:track] + data[track:].replace(plain, turned, 1))
    assert video_record("a", "", lambda: str(path)).read(np.zeros(1)).shape == (1, 48, 32, 3)


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
    assert [r.name for r in folder.rows] == ["b.mp4", "sub/a.mp4"]
    assert folder[1].caption == "ein grauer Würfel"
    with pytest.raises(BadRecord, match=r"b\.mp4: the caption is missing"):
        folder[0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "No videos in .*looked for"),
        ('{"file_name": "a.mp4"}\n{oops\n', "line 2 is not JSON"),
        ('{"caption": "x"}\n', 'line 1 has no "file_name"'),
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
    with pytest.raises(ValueError, match="None of the 1 videos"):
        VideoFolder(str(tmp_path), "validation", validation_fraction=0.0)
    with pytest.raises(ValueError, match=r"holds no features\.json"):
        Records(str(tmp_path))
    with pytest.raises(ConfigError, match="unknown name"):
        build({"name": "folders"}, SOURCES, "source")


def noise_clip(path):
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(10):
            picture = rng.integers(0, 255, (64, 64, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(stream.encode(None))
    return Path(path).read_bytes()


def flipped(data):
    """Return the file with the middle half of its payload inverted.

    A few flipped bytes may decode to other pixels without an error, in any decoder. Records have
    checksums against that, files do not.
    """
    begin, size = data.index(b"mdat"), len(data) - data.index(b"mdat")
    middle = slice(begin + size // 4, begin + 3 * size // 4)
    return data[: middle.start] + bytes(255 - b for b in data[middle]) + data[middle.stop :]


def test_a_file_cut_between_two_frames_is_found_before_it_is_decoded(tmp_path):
    data = noise_clip(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as video:
        ends = [p.pos for p in video.demux(video.streams.video[0]) if p.size]
    (tmp_path / "a.mp4").write_bytes(data[: sorted(ends)[6]])
    with pytest.raises(BadRecord, match=r"truncated: [0-9] of 10 frames"):
        video_record("a", "", lambda: str(tmp_path / "a.mp4"))


def test_a_frame_that_the_decoder_paints_over_is_a_bad_record(tmp_path):
    path, reasons = tmp_path / "a.mp4", []
    ramp = np.add.outer(np.arange(64), np.arange(64))
    write_video(
        path,
        np.stack([np.stack([ramp + 9 * t] * 3, -1) % 250 for t in range(12)]).astype(np.uint8),
        12,
        min_side=64,
    )
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(data.index(b"mdat") + 800, len(data) - 100, 12):
        path.write_bytes(data[:place] + rng.bytes(8) + data[place + 8 :])
        try:
            record = video_record("a", "", lambda: str(path))
            record.read(record.timestamps)
        except BadRecord as error:
            reasons.append(error.reason)
    assert sum("damaged frame" in r for r in reasons) >= 6, reasons


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


@pytest.mark.parametrize(
    "row, reason", [({}, "caption is missing"), ({"caption": 3}, "caption is int, expected text")]
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
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").open()]
    source = build({"name": "folder", "path": str(folder)}, SOURCES, "source")
    assert len(source) == len(rows) == 300
    for i in range(0, 300, 23):
        record = source[i]
        assert record.key == rows[i]["file_name"] and record.caption == rows[i]["caption"]
        expected = np.arange(rows[i]["num_frames"]) / rows[i]["fps"]
        np.testing.assert_allclose(record.timestamps, expected, atol=1e-4)
        assert record.read(record.timestamps).shape == (len(expected), 64, 64, 3)
