"""Video files: real timestamps, exact frames, damage that is found."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from tests.data import video_grid as grid
from vdx.data import video_files
from vdx.data.record import BadRecord
from vdx.data.video_files import is_video, video_record
from vdx.generate.video_io import write_video

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


def test_a_file_cut_between_two_frames_is_found_before_it_is_decoded(tmp_path):
    data = noise_clip(tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as video:
        ends = [p.pos for p in video.demux(video.streams.video[0]) if p.size]
    (tmp_path / "a.mp4").write_bytes(data[: sorted(ends)[6]])
    with pytest.raises(BadRecord, match=r"truncated: [0-9]+ of [0-9]+ bytes"):
        video_record("a", "", lambda: str(tmp_path / "a.mp4"))


def test_a_clip_without_a_caption_is_a_bad_record():
    with pytest.raises(BadRecord, match="the caption is missing"):
        video_record("a", None, lambda: "absent.mp4")


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


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.mpg", "a.webm"])
def test_a_cut_file_shows_true_frames_or_is_refused(tmp_path, name):
    codec = {"a.mpg": "mpeg2 open", "a.webm": "vp9", "a.avi": "mpeg4 B"}.get(name, "h264 closed")
    grid.write(grid.encode(grid.STREAMS[codec], tmp_path / "template"), tmp_path / name)
    data, read = (tmp_path / name).read_bytes(), 0
    for end in np.linspace(len(data) * 0.3, len(data) - 1, 12).astype(int):
        (tmp_path / name).write_bytes(data[:end])
        try:
            record = video_record("a", "", lambda: str(tmp_path / name))
            shown = grid.numbers(record.read(record.timestamps))
        except BadRecord:
            continue
        read += 1
        assert shown == np.rint(record.timestamps * grid.RATE).astype(int).tolist()
    assert read == 0 or name in ("a.ts", "a.mpg"), "these declare how long they are"


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".apng"])
def test_an_animated_image_is_a_clip(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    frames = [Image.fromarray(grid.draw(number)) for number in range(6)]
    durations = [40, 100, 50, 200, 70, 90]  # milliseconds
    frames[0].save(
        path,
        format="PNG" if suffix == ".apng" else None,
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
    )
    assert is_video(path)
    record = video_record("a", "", lambda: str(path))
    np.testing.assert_allclose(record.timestamps, np.cumsum([0, *durations[:-1]]) / 1000)
    assert record.duration == pytest.approx(sum(durations) / 1000)
    for window in ([0, 1, 2, 3, 4, 5], [3], [5, 1, 1], [4, 5]):
        assert grid.numbers(record.read(record.timestamps[window])) == window

    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 4])
    with pytest.raises(BadRecord, match=r"truncated|damaged"):
        video_record("a", "", lambda: str(path)).read(record.timestamps)


def test_a_still_image_is_no_clip(tmp_path):
    Image.fromarray(grid.draw(1)).save(tmp_path / "a.png")
    (tmp_path / "b.webp").write_bytes(b"RIFF")
    assert not is_video(tmp_path / "a.png") and not is_video(tmp_path / "b.webp")


def test_a_frame_is_changed_as_soon_as_it_is_decoded(tmp_path, monkeypatch):
    path = make_clip(tmp_path / "a.mp4", np.arange(8) / 8)
    record = video_record("a", "", lambda: path)
    whole = record.read(record.timestamps)
    monkeypatch.setattr(video_files, "MOST_BYTES", whole[0].nbytes)
    with pytest.raises(BadRecord, match="8 frames of 32x48 take 36864 bytes, more than 4608"):
        record.read(record.timestamps)
    corners = record.read_frames(record.timestamps, lambda frame: frame[:4, :4])
    np.testing.assert_array_equal(corners, whole[:, :4, :4])


def test_files_joined_without_new_times_are_refused(tmp_path):
    grid.write(grid.encode(grid.STREAMS["mpeg2 open"], tmp_path / "template"), tmp_path / "a.ts")
    (tmp_path / "b.ts").write_bytes(2 * (tmp_path / "a.ts").read_bytes())
    with pytest.raises(BadRecord, match=r"times of its frames go back|is incomplete"):
        video_record("b", "", lambda: str(tmp_path / "b.ts"))


def test_a_header_that_counts_otherwise_is_no_truncation(tmp_path):
    path = Path(make_clip(tmp_path / "a.mp4", np.arange(8) / 8))
    data = path.read_bytes()
    path.write_bytes(data + bytes(1000))  # and padding is no truncation either
    assert video_record("a", "", lambda: str(path)).read(np.zeros(1)).shape == (1, 32, 48, 3)


def test_the_cover_of_a_film_is_not_its_video(tmp_path):
    grid.write(grid.encode(grid.STREAMS["h264 closed"], tmp_path / "template"), tmp_path / "a.mkv")
    with av.open(str(tmp_path / "a.mkv")) as film, av.open(str(tmp_path / "b.mp4"), "w") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        video = out.add_stream_from_template(film.streams.video[0], opaque=True)
        image = av.VideoFrame.from_ndarray(grid.draw(500), "rgb24").reformat(format="yuvj420p")
        image.pts, image.time_base = 0, Fraction(1, 1)
        out.mux(cover.encode(image))
        out.mux(cover.encode(None))
        for packet in film.demux(film.streams.video[0]):
            if packet.size:
                packet.stream = video
                out.mux(packet)
    record = video_record("b", "", lambda: str(tmp_path / "b.mp4"))
    assert grid.numbers(record.read(record.timestamps)) == list(range(grid.FRAMES))


def test_a_file_is_indexed_once_until_it_changes(tmp_path, monkeypatch):
    calls = []
    indexed = video_files.output_order
    monkeypatch.setattr(
        video_files, "output_order", lambda *args: calls.append(1) or indexed(*args)
    )
    encoded = grid.encode(grid.STREAMS["mpeg2 open"], tmp_path / "template")
    path = tmp_path / "a.ts"
    grid.write(encoded, path)
    for _ in range(3):
        assert len(video_record("a", "", lambda: str(path)).timestamps) == grid.FRAMES
    assert len(calls) == 1

    first = encoded.keys()[1][0]
    grid.write(encoded, path, first=first)
    assert len(video_record("a", "", lambda: str(path)).timestamps) < grid.FRAMES
    assert len(calls) == 2
