"""Clips are read as they were written: rate, colours, sizes, no half-written files."""

import subprocess
import sys
from fractions import Fraction

import av
import jax
import numpy as np
import pytest
from PIL import Image

from vdx.files import read_json, write_json
from vdx.generate.control_inputs import _read_video
from vdx.generate.video_io import (
    NotFinite,
    frames_at,
    read_video,
    to_uint8,
    to_uint8_on_device,
    write_gif,
    write_video,
    write_webp,
)

COLOURS = [(228, 32, 40), (40, 176, 56), (48, 92, 246), (250, 226, 50), (0, 0, 0), (255, 255, 255)]


def clip(height=32, width=48, frames=6):
    """Frame i is flat in colour i."""
    flat = np.array([COLOURS[i % len(COLOURS)] for i in range(frames)], np.uint8)
    return np.broadcast_to(flat[:, None, None], (frames, height, width, 3)).copy()


@pytest.mark.parametrize(
    "fps, rate",
    [
        (12, Fraction(12)),
        (8.5, Fraction(17, 2)),
        (24000 / 1001, Fraction(24000, 1001)),
        (1, Fraction(1)),
    ],
)
def test_the_rate_is_exact(tmp_path, fps, rate):
    write_video(tmp_path / "a.mp4", clip(), fps)
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].average_rate == rate
    frames, times = read_video(tmp_path / "a.mp4")
    np.testing.assert_allclose(times, np.arange(6) / float(rate), atol=1e-4)
    assert len(frames) == 6


def test_colours_survive_and_the_file_names_the_matrix(tmp_path):
    write_video(tmp_path / "a.mp4", clip(), 12)
    frames, _ = read_video(tmp_path / "a.mp4")
    assert np.abs(frames[:, ::4, ::4].astype(int) - clip()).max() <= 4
    with av.open(str(tmp_path / "a.mp4")) as video:
        codec = video.streams.video[0].codec_context
        assert (codec.pix_fmt, codec.colorspace, codec.color_range) == ("yuv420p", 1, 1)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser may begin before the end


@pytest.mark.parametrize(
    "size, min_side, written",
    [
        ((32, 48), 128, (128, 192)),
        ((64, 64), 128, (128, 128)),
        ((50, 70), 128, (150, 210)),
        ((31, 45), 1, (32, 46)),
        ((160, 128), 128, (160, 128)),
        ((1, 3), 16, (16, 48)),
    ],
)
def test_small_clips_are_enlarged_by_whole_factors_and_odd_sizes_fit(
    tmp_path, size, min_side, written
):
    write_video(tmp_path / "a.mp4", clip(*size), 12, min_side)
    assert read_video(tmp_path / "a.mp4")[0].shape == (6, *written, 3)


def test_single_pixels_keep_their_colour_when_enlarged(tmp_path):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[:, 10, 11] = (250, 30, 30)
    write_video(tmp_path / "a.mp4", frames, 12)
    back = read_video(tmp_path / "a.mp4")[0][:, 41:43, 45:47].mean((1, 2))  # inside the 4x4 block
    assert np.abs(back - (250, 30, 30)).max() < 40


@pytest.mark.parametrize("write", [write_video, write_webp])
def test_nothing_half_written_is_left(tmp_path, write):
    path = tmp_path / ("a.mp4" if write is write_video else "a.webp")
    path.write_bytes(b"the old one")
    for frames, fps in ((clip().astype(float), 12), (clip()[:0], 12), (clip(), 0), (clip()[0], 9)):
        with pytest.raises(ValueError):
            write(path, frames, fps)
    assert path.read_bytes() == b"the old one"
    write(path, clip(), 12)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_webp_is_lossless_and_keeps_time(tmp_path):
    write_webp(tmp_path / "a.webp", clip(frames=5), 12)
    image, lengths = Image.open(tmp_path / "a.webp"), []
    assert image.n_frames == 5
    for i in range(5):
        image.seek(i)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), clip(frames=5)[i])
        lengths.append(image.info["duration"])
    assert sum(lengths) == round(5000 / 12)


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"a\.mp4 is not a readable video"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 is not a readable video"):
        read_video(tmp_path / "b.mp4")


def test_to_uint8_rounds_and_clips():
    assert to_uint8([-2, -1, -0.9999, 0, 0.999, 1, 3]).tolist() == [0, 0, 0, 128, 255, 255, 255]
    steps = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(steps / np.float32(127.5) - 1), steps)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_to_uint8_refuses_what_is_not_finite(bad):
    """NaN would become a grey level, and infinity black or white."""
    with pytest.raises(NotFinite, match="NaN or infinite"):
        to_uint8([0.0, bad])


def test_to_uint8_inside_a_program_has_the_same_bits():
    """Also next to the values where rounding changes: one rounding less would show."""
    middle = ((np.arange(255) + 0.5) / 127.5 - 1).astype(np.float32)
    x = np.concatenate([middle, np.random.default_rng(0).uniform(-1.1, 1.1, 10**6)])
    x = x.astype(np.float32)
    x = np.concatenate([x, *(np.nextafter(x[:255], np.float32(to)) for to in (-2, 2))])
    np.testing.assert_array_equal(jax.jit(to_uint8_on_device)(x), to_uint8(x))


def test_frames_may_come_one_by_one(tmp_path):
    frames = clip(5, 15, 21)
    write_video(tmp_path / "a.mp4", frames, 12)
    write_video(tmp_path / "b.mp4", (frame for frame in frames), 12)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with pytest.raises(ValueError, match=r"expected uint8 \[t h w 3\]"):
        write_video(tmp_path / "c.mp4", iter(()), 12)


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "a.json", {"prompt": "ein Würfel"})
    assert read_json(tmp_path / "a.json") == {"prompt": "ein Würfel"}
    with pytest.raises(ValueError, match=r"b\.json cannot be read"):
        read_json(tmp_path / "b.json")


def test_importing_the_data_side_brings_no_heavy_library():
    code = (
        "import sys, vdx.data.sources, vdx.data.pipeline, vdx.data.transforms, "
        "vdx.generate.video_io; "
        "print({'torch', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_same_frames_are_the_same_bytes(tmp_path):
    """At a size at which x264 with its defaults differs from one time to the next."""
    frames = np.random.default_rng(0).integers(0, 255, (17, 40, 72, 3)).astype(np.uint8)
    made = set()
    for number in range(8):
        write_video(tmp_path / f"{number}.mp4", frames, 16.0)
        made.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(made) == 1


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A video of 23.976 frames per second, whose frame i has the grey level 10 (i % 25)."""
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=Fraction(24000, 1001))
        stream.width = stream.height = 16
        for number in range(540):  # the last ones are half a frame off their places at 24
            pixels = np.full((16, 16, 3), 10 * (number % 25), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return str(path)


def steps(frames):
    """Return by how many frames each frame of a film follows the last."""
    levels = np.array([frame.mean() for frame in frames])
    return set(np.diff(np.rint(levels / 10)) % 25)


@pytest.mark.parametrize("fps, step", [(24.0, 1), (24 / 1.001, 1), (12.0, 2)])
def test_near_integer_rates_give_frames_in_a_row(film, fps, step):
    frames = list(frames_at(film, fps))
    assert len(frames) == 540 // step and steps(frames) == {step}
    assert steps(_read_video("depth", film, fps, 200)) == {step}


def test_other_rates_keep_their_times(film):
    frames = list(frames_at(film, 22.0))
    assert len(frames) == 496 and steps(frames) == {1, 2}
    with pytest.raises(ValueError, match=r"has 22.5 s, and the clip 22\.6 s"):
        _read_video("depth", film, 22.0, 498)


@pytest.mark.parametrize("fps", [4.0, 16.0, 24000 / 1001, 50.0])
def test_gif_has_the_colours_and_the_duration_of_the_clip(fps, tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (200, 3), np.uint8)
    frames = colours[rng.integers(0, 200, (20, 48, 64))]
    write_gif(tmp_path / "a.gif", (frame for frame in frames), fps)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames == 20 and gif.info["loop"] == 0
        milliseconds = 0
        for number, frame in enumerate(frames):
            gif.seek(number)
            milliseconds += gif.info["duration"]
            shown = np.asarray(gif.convert("RGB"))[::3, ::3]  # enlarged to 144 rows
            np.testing.assert_array_equal(shown, frame)
    assert abs(milliseconds - 20_000 / fps) <= 5


def test_gif_of_more_frames_than_browsers_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most 50 frames per second, not 60"):
        write_gif(tmp_path / "a.gif", clip(), 60)
