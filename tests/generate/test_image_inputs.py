"""Files of images, videos and animations, as pretrained models read them."""

import itertools
import os

import numpy as np
import pytest
from PIL import Image

from tests.data.test_animation import LEVELS, animation
from vdx.config.build import ConfigError
from vdx.data.track_files import TRACK_FILES
from vdx.generate.image_inputs import count_frames, iter_frames, open_image
from vdx.generate.video_io import write_webp


def levels(path, fps, most=100):
    frames = itertools.islice(iter_frames("control", str(path), fps), most)
    return [round(np.asarray(frame).mean()) for frame in frames]


@pytest.mark.parametrize(
    "format, suffix", [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("PNG", "apng")]
)
def test_an_animation_has_the_frames_on_the_screen(tmp_path, format, suffix):
    durations = [100, 300, 100, 50, 200]  # milliseconds
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(animation(format, durations))
    shown = np.repeat(LEVELS, np.array(durations) // 50)  # at 20 frames per second
    assert levels(path, 20.0) == shown.tolist()
    assert levels(path, 10.0) == [0, 60, 60, 60, 120, 180, 240, 240]
    assert count_frames("control", str(path), 20.0, 100) == 15


@pytest.mark.parametrize("fps", [8, 12, 16, 23.976, 24, 29.97, 30])
def test_what_vdx_writes_as_webp_comes_back_frame_by_frame(tmp_path, fps):
    frames = np.arange(0, 200, 5, dtype=np.uint8)[:, None, None, None] + np.zeros(
        (1, 8, 8, 3), np.uint8
    )
    write_webp(tmp_path / "a.webp", frames, fps)
    assert levels(tmp_path / "a.webp", fps) == frames[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff"])
def test_a_still_image_has_no_end(tmp_path, suffix):
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).save(tmp_path / f"a.{suffix}", lossless=True)
    assert levels(tmp_path / f"a.{suffix}", 16.0, most=7) == [77] * 7


def test_what_cannot_be_read_names_flag_and_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.gif")
    (tmp_path / "text.webp").write_text("text")
    (tmp_path / "cut.gif").write_bytes(animation("GIF", [50] * 5)[:300])
    for name in ("pipe.gif", "text.webp", "cut.gif", "missing.png", "missing.mp4"):
        with pytest.raises(ConfigError, match=rf"--control.*{name}"):
            levels(tmp_path / name, 16.0)
    with pytest.raises(ConfigError, match=r"--image=.*cut\.gif"):
        open_image("image", str(tmp_path / "cut.gif"))


# Tracks -----------------------------------------------------------------------------------------


def track(name, path, frames=3, video=None):
    return TRACK_FILES[name](path, np.arange(frames), frames, video)


def test_a_still_map_is_that_of_all_frames(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    got = track("depth", tmp_path / "a.png")
    assert got.shape == (3, 8, 8, 1)
    np.testing.assert_allclose(got, np.broadcast_to(ramp[..., None] / 65535, got.shape), atol=1e-6)
    pose = track("pose", tmp_path / "a.png")
    np.testing.assert_allclose(pose, np.broadcast_to(got, (3, 8, 8, 3)), atol=1 / 255)


@pytest.mark.parametrize("dtype, top", [(np.uint8, 255), (np.uint16, 65535), (np.float64, 1)])
def test_arrays_are_scaled_by_their_type(tmp_path, dtype, top):
    maps = np.linspace(0, top, 48).reshape(3, 4, 4).astype(dtype)
    np.save(tmp_path / "a.npy", maps)
    got = track("depth", tmp_path / "a.npy")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[..., 0], maps / top, atol=1e-6)


def test_an_animated_map_is_read_at_the_instants_of_the_clip(tmp_path):
    (tmp_path / "a.webp").write_bytes(animation("WEBP", [50] * 5))
    video = np.zeros((3, 8, 8, 3), np.uint8) + np.uint8([[[[51]]], [[[102]]], [[[255]]]])
    got = track("depth", tmp_path / "a.webp", video=lambda: video)
    np.testing.assert_allclose(got[:, 0, 0, 0], [0.2, 0.4, 1.0])


def test_only_one_regular_image_is_a_reference(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.npy")
    (tmp_path / "b.png").write_bytes(animation("PNG", [50] * 5))
    with pytest.raises(ValueError, match="only regular files"):
        track("reference", tmp_path / "a.png")
    with pytest.raises(ValueError, match="only regular files"):
        track("depth", tmp_path / "a.npy")
    with pytest.raises(ValueError, match="animated"):
        track("reference", tmp_path / "b.png")


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04"])
def test_what_is_no_array_is_refused(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a \.npy file of one array"):
        track("depth", tmp_path / "a.npy")
