"""Images are read as browsers show them; what cannot be read is refused before it is decoded."""

import io
import os
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from vdx.data.images import MOST_PIXELS, read_image, read_map, to_unit

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 20, 3), np.uint8)
# The file stores what a camera saw while it was turned: EXIF 2.32, Orientation.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def encoded(image, format="PNG", **options):
    """Return an image, or its pixels, as the bytes of a file."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def read(*args, **options):
    return read_image(io.BytesIO(encoded(*args, **options)))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_every_turn_of_exif_is_applied(turn, format):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 100}}
    smooth = np.add.outer(np.arange(24), 3 * np.arange(40)).astype(np.uint8)[..., None].repeat(3, 2)
    got = read(smooth, format, exif=exif, **options.get(format, {}))
    expected = TURNS[turn](smooth)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= (3 if format == "JPEG" else 0)


def on_white(colours, alpha):
    opacity = np.asarray(alpha, np.float64)[..., None] / 255
    return colours * opacity + 255 * (1 - opacity)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_every_alpha_is_composited_on_white(format):
    alpha = np.arange(256, dtype=np.uint8)[:, None].repeat(20, 1)
    colours = RNG.integers(0, 256, (256, 20, 3), np.uint8)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    got = read(np.dstack([colours, alpha]), format, **options)
    assert np.abs(got - on_white(colours, alpha)).max() <= 0.5 + 1e-9


def test_grey_and_palettes_with_transparency():
    alpha = RNG.integers(0, 256, (12, 20), np.uint8)
    grey = COLOURS[..., 0]
    got = read(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]))
    assert np.abs(got - on_white(grey[..., None].repeat(3, 2), alpha)).max() <= 0.5 + 1e-9

    index = RNG.integers(0, 4, (12, 20), np.uint8)
    palette = RNG.integers(0, 256, (4, 3), np.uint8)
    image = Image.fromarray(index).convert("P")
    image.putpalette(palette.tobytes())
    opacity = np.array([0, 100, 200, 255], np.uint8)
    got = read(image, transparency=opacity.tobytes())
    assert np.abs(got - on_white(palette[index], opacity[index])).max() <= 0.5 + 1e-9
    assert (read(image, transparency=2)[index == 2] == 255).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_one_transparent_level_of_a_grey_png(dtype):
    top = np.iinfo(dtype).max
    ramp = np.linspace(0, top, 256).astype(dtype).reshape(16, 16)
    got = read(ramp, transparency=int(ramp[3, 3]))
    expected = np.rint(ramp / top * 255)
    expected[3, 3] = 255
    np.testing.assert_array_equal(got[..., 0], expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(format):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = encoded(ramp, format)
    got = read_image(io.BytesIO(data))
    np.testing.assert_array_equal(got, np.rint(ramp / 257)[..., None].repeat(3, 2))
    nearness = read_map(io.BytesIO(data))
    np.testing.assert_allclose(nearness, ramp / 65535, atol=1e-7)
    assert (np.diff(nearness.ravel()) > 0).all()


def grey_tiff(levels, bits, photometric=1, sample_format=1):
    """Return an uncompressed little-endian TIFF of levels [h w], packed by TIFF 6.0."""
    height, width = levels.shape
    if bits == 16:
        data = levels.astype("<u2").tobytes()
    else:
        ones = levels[..., None] >> np.arange(bits)[::-1] & 1  # the highest bit comes first
        data = np.packbits(ones.reshape(height, -1), axis=1).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample_format}
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data += bytes(len(data) % 2)
    directory = struct.pack("<H", len(tags)) + rows + bytes(4)
    return io.BytesIO(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)


@pytest.mark.parametrize("bits", range(1, 17))
def test_a_tiff_of_every_depth_is_scaled_by_its_depth_or_refused(bits):
    top = (1 << bits) - 1
    ramp = np.rint(np.linspace(0, top, 64)).astype(int).reshape(4, 16)
    if bits not in (1, 2, 4, 8, 12, 16):
        with pytest.raises(ValueError, match="whose samples cannot be read: expected grey of"):
            read_image(grey_tiff(ramp, bits))
        return
    np.testing.assert_array_equal(
        read_image(grey_tiff(ramp, bits))[..., 0], np.rint(ramp / top * 255)
    )
    tolerance = 1e-7 if bits > 8 else 0.5 / 255
    np.testing.assert_allclose(read_map(grey_tiff(ramp, bits)), ramp / top, atol=tolerance)


def test_a_signed_or_inverted_deep_tiff():
    ramp = np.linspace(0, 32767, 64).astype(int).reshape(4, 16)
    signed = read_map(grey_tiff(ramp, 16, sample_format=2))
    np.testing.assert_allclose(signed, ramp / 32767, atol=1e-7)
    with pytest.raises(ValueError, match="16 bits a sample in which 0 is white: invert it"):
        read_image(grey_tiff(ramp, 16, photometric=0))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_a_jpeg_2000_is_scaled_by_its_depth(bits):
    top = (1 << bits) - 1
    ramp = np.rint(np.linspace(0, top, 256)).reshape(16, 16)
    codec = av.codec.CodecContext.create("jpeg2000", "w")
    codec.width, codec.height, codec.time_base = 16, 16, Fraction(1, 1)
    codec.pix_fmt = f"gray{bits}le" if bits > 8 else "gray"
    codec.options = {"pred": "dwt53"}  # without loss
    dtype = np.uint16 if bits > 8 else np.uint8
    frame = av.VideoFrame(16, 16, codec.pix_fmt)
    lines = np.zeros((16, frame.planes[0].line_size // dtype().itemsize), dtype)
    lines[:, :16] = ramp
    frame.planes[0].update(lines.tobytes())
    frame.pts = 0
    data = b"".join(map(bytes, [*codec.encode(frame), *codec.encode(None)]))
    np.testing.assert_allclose(
        read_map(io.BytesIO(data)), ramp / top, atol=1e-7 if bits > 8 else 0.5 / 255
    )
    assert read_image(io.BytesIO(data)).max() == 255


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.25, 0.75), (-3, 7), (0, 255), (1000, 1001)])
def test_float_maps_are_kept_in_0_to_1_and_scaled_outside(low, high):
    ramp = np.linspace(low, high, 256).astype(np.float32).reshape(16, 16)
    expected = ramp if low >= 0 and high <= 1 else (ramp - ramp.min()) / np.ptp(ramp)
    data = encoded(ramp, "TIFF")
    np.testing.assert_allclose(read_map(io.BytesIO(data)), expected, atol=1e-6)
    got = read_image(io.BytesIO(data))[..., 0]
    assert (
        np.abs(got - 255 * expected).max() <= 0.51 and (np.diff(got.ravel().astype(int)) >= 0).all()
    )


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), np.nan, np.float32), "not finite"),
        (np.full((4, 4), 3, np.float32), r"holds 3 to 3, expected \[0, 1\]"),
        (np.full((4, 4), -1, np.int32), r"holds -1 to -1, expected \[0, 65535\]"),
        (np.full((4, 4), 70_000, np.int32), r"expected \[0, 65535\]"),
    ],
)
def test_levels_that_mean_nothing_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        read(pixels, "TIFF")


def test_to_unit_of_every_type():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535), (np.int32, 65535), (np.float16, 1)):
        np.testing.assert_array_equal(to_unit(np.array([0, top], dtype)), np.float32([0, 1]))
    with pytest.raises(ValueError, match="holds bool"):
        to_unit(np.array([True]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_every_mode_shows_its_colours(mode):
    flat = np.zeros((8, 8, 3), np.uint8) + np.uint8(
        [255, 255, 255] if mode in "1L" else [0, 0, 255]
    )
    image = Image.fromarray(flat).convert(mode)
    got = read(image, "PNG" if mode in "1LPRGB" else "TIFF")
    assert np.abs(got.astype(int) - flat).max() <= 2


# Profiles ------------------------------------------------------------------------------------


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_a_profile_is_applied():
    np.testing.assert_array_equal(read(COLOURS, icc_profile=SRGB), COLOURS)
    # A display whose red is the blue of sRGB, and the other way round.
    red, blue = SRGB.index(b"rXYZ"), SRGB.index(b"bXYZ")
    swapped = bytearray(SRGB)
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    got = read(COLOURS, icc_profile=bytes(swapped))
    assert np.abs(got.astype(int) - COLOURS[..., ::-1]).max() <= 2


def test_a_profile_that_cannot_be_applied_is_refused():
    with pytest.raises(ValueError, match="colour profile"):
        read(COLOURS, icc_profile=b"not a profile" * 20)
    cmyk = Image.fromarray(COLOURS).convert("CMYK")
    with pytest.raises(ValueError, match="colour profile"):
        read(cmyk, "TIFF", icc_profile=SRGB)


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_hdr_of_png_and_avif_is_tone_mapped():
    white = np.full((16, 16, 3), round(0.58 * 255), np.uint8)  # of PQ: BT.2408
    png = encoded(white)
    png = png[:33] + chunk(b"cICP", bytes([9, 16, 0, 1])) + png[33:]
    assert 224 <= read_image(io.BytesIO(png)).min() <= read_image(io.BytesIO(png)).max() <= 236

    avif = encoded(white, "AVIF", quality=100)
    head, tail = avif.split(b"colrnclx", 1)
    avif = head + b"colrnclx" + struct.pack(">HH", 9, 16) + tail[4:]
    assert 220 <= read_image(io.BytesIO(avif)).mean() <= 238


# Files that are not what they seem -------------------------------------------------------------


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    def never(*args):
        raise AssertionError("memory for pixels")

    monkeypatch.setattr(Image.core, "new", never)
    monkeypatch.setattr(Image.core, "fill", never)
    for width, height in ((100_000, 100_000), (10_000, 9_000), (1, MOST_PIXELS + 1)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        data = (
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        )
        with pytest.raises(ValueError, match="pixels"):
            read_image(io.BytesIO(data))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        b"<html></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
    ],
)
def test_what_is_no_image_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"image|truncated"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_a_truncated_image_is_refused_or_whole(format):
    data = encoded(COLOURS.repeat(3, 0).repeat(3, 1), format)
    whole = read_image(io.BytesIO(data))
    refused = 0
    for cut in np.linspace(1, len(data) - 1, 40).astype(int):
        try:
            np.testing.assert_array_equal(read_image(io.BytesIO(data[:cut])), whole)
        except ValueError:
            refused += 1
    assert refused >= 38


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="only regular files are read"):
            read_image(path)
    with pytest.raises(OSError, match="No such file"):
        read_image(tmp_path / "missing.png")


def test_several_images_are_not_one():
    more = [Image.fromarray(255 - COLOURS)]
    for format, reason in (("GIF", "animated"), ("PNG", "animated"), ("TIFF", "several pages")):
        with pytest.raises(ValueError, match=reason):
            read(COLOURS, format, save_all=True, append_images=more)
    # Phones store a preview or a gain map behind the image.
    got = read(COLOURS.repeat(8, 0), "MPO", save_all=True, append_images=more)
    np.testing.assert_array_equal(got, read(COLOURS.repeat(8, 0), "JPEG"))
