"""Images as the makers of Wan and diffusers prepare them, by torch and by the makers' formulas."""

import numpy as np
import pytest
from PIL import Image

from vdx.generate.preprocess import (
    CHOICES,
    PREPROCESS,
    bicubic,
    floored_size,
    nearest_size,
    preprocess_for,
)

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
AREAS = [480 * 832, 720 * 1280, 704 * 1280]


def picture(width, height):
    """An image of large and small structures."""
    coarse = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
    return Image.fromarray(pixels ^ RNG.integers(0, 32, pixels.shape, np.uint8))


def torch_bicubic(x, height, width):
    moved = torch.from_numpy(x).movedim(-1, 0)[None]
    size = (height, width)
    y = torch.nn.functional.interpolate(moved, size, mode="bicubic", antialias=False)
    return y[0].movedim(0, -1).numpy()


@pytest.mark.parametrize("trial", range(30))
def test_bicubic_is_torchs(trial):
    rng = np.random.default_rng(trial)
    h, w, height, width = rng.integers(1, 90, 4)  # smaller, larger, and of one pixel
    x = rng.normal(size=(h, w, 3)).astype(np.float32)
    want = torch_bicubic(x, int(height), int(width))
    # Within 4e-6 where torch rounds positions once (FMA), within 3e-5 where it does twice.
    np.testing.assert_allclose(bicubic(x, height, width), want, atol=4e-5)


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (48, 48), (203, 91)])
def test_the_makers_frame_and_clip(size):
    image = picture(*size)
    tensor = (np.asarray(image, np.float32) / 255 - 0.5) / 0.5
    official = PREPROCESS["official"]
    frame = official.frame(image, 32, 48)
    np.testing.assert_allclose(frame, torch_bicubic(tensor, 32, 48), atol=4e-5)

    # The whole image, squeezed, in CLIP's statistics.
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    want = (torch_bicubic(tensor, 28, 28) * 0.5 + 0.5 - mean) / std
    got = official.clip_pixels([image, image], 28)
    assert got.shape == (2, 28, 28, 3)
    np.testing.assert_allclose(got[1], want, atol=1e-4)


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (203, 91)])
def test_the_frame_of_diffusers(size):
    processor = pytest.importorskip("diffusers.video_processor").VideoProcessor()
    image = picture(*size)
    want = processor.preprocess(image, height=32, width=48)[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(PREPROCESS["diffusers"].frame(image, 32, 48), want, atol=1e-6)
    assert np.abs(PREPROCESS["official"].frame(image, 32, 48) - want).max() > 0.05


def makers_floored(area, unit, width, height):
    """The makers' order of operations: latent sizes of float areas, in steps of a patch of 2."""
    stride = unit // 2
    aspect = height / width
    tall = round(np.sqrt(area * aspect) // stride // 2 * 2) * stride
    wide = round(np.sqrt(area / aspect) // stride // 2 * 2) * stride
    return tall, wide


def test_sizes_are_the_makers():
    assert floored_size(480 * 832, 16, 832, 480) == (464, 832)
    for _ in range(3000):
        width, height = (int(n) for n in RNG.integers(64, 4000, 2))
        area = int(RNG.choice(AREAS))
        assert floored_size(area, 16, width, height) == makers_floored(area, 16, width, height)


def test_the_size_of_5b_is_the_nearest_within_the_area():
    """Of all sizes within the area that one more unit would leave: the nearest proportions."""
    assert nearest_size(704 * 1280, 32, 1280, 704) == (704, 1280)
    for _ in range(300):
        width, height = (int(n) for n in RNG.integers(300, 3000, 2))
        size = nearest_size(704 * 1280, 32, width, height)
        assert size.height % 32 == size.width % 32 == 0 and size.height * size.width <= 704 * 1280
        assert (size.height + 32) * (size.width + 32) > 704 * 1280
        wide = 704 * 1280 / size.height // 32 * 32
        tall = 704 * 1280 / size.width // 32 * 32
        assert size.width == wide or size.height == tall


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (203, 91), (64, 64)])
def test_5b_covers_the_frame_and_crops_its_centre(size):
    image = picture(*size)
    official = preprocess_for("official", clamps_first_frame=True)
    frame = official.frame(image, 64, 96)
    assert frame.shape == (64, 96, 3) and np.abs(frame).max() <= 1

    # The same as a crop before the resizing, but for rounding and the edges.
    scale = max(96 / size[0], 64 / size[1])
    wide, tall = 96 / scale, 64 / scale
    left, top = (size[0] - wide) / 2, (size[1] - tall) / 2
    box = (left, top, left + wide, top + tall)
    crop = image.resize((96, 64), Image.Resampling.LANCZOS, box=box)
    want = np.asarray(crop, np.float32) / 127.5 - 1
    assert np.mean(np.abs(frame - want)) < 0.1 < np.mean(np.abs(frame[:, ::-1] - want))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("clamps", [False, True])
def test_sizes_are_multiples_of_a_unit(name, clamps):
    way = preprocess_for(name, clamps)
    for width, height in ((1, 4000), (4000, 1), (7, 7)):
        size = way.frame_size(480 * 832, 16, width, height)
        assert size.height % 16 == size.width % 16 == 0 and min(size) >= 16
