"""Animated images have the frames and durations that were written."""

import io

import numpy as np
import pytest
from PIL import Image

from vdx.data.animation import is_animation, iter_animation

LEVELS = [0, 60, 120, 180, 240]
FORMATS = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "AVIF": {"quality": 100}}


def animation(format, durations, levels=LEVELS, **options):
    """Return a file of flat grey frames, shown for `durations` in milliseconds."""
    images = [Image.fromarray(np.full((32, 48, 3), level, np.uint8)) for level in levels]
    file = io.BytesIO()
    options = {"duration": list(durations), "loop": 0} | FORMATS[format] | options
    images[0].save(file, format=format, save_all=True, append_images=images[1:], **options)
    return file.getvalue()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("durations", [[40] * 5, [40, 500, 70, 120, 1000], [20, 30, 20, 30, 20]])
def test_frames_and_their_own_durations(format, durations):
    data = animation(format, durations)
    assert is_animation(io.BytesIO(data))
    frames = list(iter_animation(io.BytesIO(data)))
    assert [frame.pixels.shape for frame in frames] == [(32, 48, 3)] * 5
    np.testing.assert_allclose([f.pixels.mean() for f in frames], LEVELS, atol=1)
    np.testing.assert_allclose([f.seconds for f in frames], np.array(durations) / 1000)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_durations_of_at_most_10_ms_are_those_of_browsers(format):
    frames = list(iter_animation(io.BytesIO(animation(format, [0, 10, 20, 0, 100]))))
    assert [frame.seconds for frame in frames] == [0.1, 0.1, 0.02, 0.1, 0.1]


def test_transparent_frames_are_on_white():
    alpha = np.zeros((8, 8, 4), np.uint8)
    images = [Image.fromarray(alpha + np.uint8([9 * i, 0, 0, 0])) for i in range(3)]
    images[1].putpixel((0, 0), (10, 20, 30, 255))
    file = io.BytesIO()
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], lossless=True, exact=True)
    first, second, _ = iter_animation(file)
    assert (first.pixels == 255).all() and second.pixels[0, 0].tolist() == [10, 20, 30]
    assert (second.pixels[1:] == 255).all()


def test_the_default_image_of_an_apng_is_no_frame():
    frames = iter_animation(io.BytesIO(animation("PNG", [50] * 4, default_image=True)))
    assert [frame.pixels.max() for frame in frames] == LEVELS[1:]


@pytest.mark.parametrize("format", FORMATS)
def test_a_still_image_is_one_frame(format):
    file = io.BytesIO()
    Image.fromarray(np.full((32, 48, 3), 120, np.uint8)).save(file, format)
    assert not is_animation(file)
    (frame,) = iter_animation(file)
    assert abs(frame.pixels.mean() - 120) <= 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_animation_is_refused(format):
    data = animation(format, [40] * 5)
    for cut in np.linspace(1, len(data) - 21, 60).astype(int):
        with pytest.raises(ValueError, match=r"image|truncated|damaged"):
            list(iter_animation(io.BytesIO(data[:cut])))


def test_an_animation_is_read_as_it_is_iterated():
    data = animation("PNG", [40] * 5)
    frames = iter_animation(io.BytesIO(data[: 3 * len(data) // 4]))
    assert next(frames).pixels.max() == 0 and next(frames).pixels.max() == 60
    with pytest.raises(ValueError, match=r"damaged|truncated"):
        list(frames)
