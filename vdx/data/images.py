"""Image files as browsers show them: upright, in sRGB, opaque.

One rule for training and sampling; docs/inputs.md lists it. Callers add the file's name to errors.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from vdx.data.tone_mapping import GAMUTS, TRANSFERS, to_sdr
from vdx.files import open_regular

__all__ = [
    "BACKGROUND",
    "MOST_PIXELS",
    "SUFFIXES",
    "ImageFile",
    "is_animated",
    "load",
    "open_image_file",
    "read_image",
    "read_map",
    "to_rgb",
    "to_unit",
]

# A path, or a file that is open for reading bytes.
ImageFile = str | Path | BinaryIO

# Suffixes of the formats below.
SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pfm", ".pgm", ".png", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
)
# Pillow's other formats are rare, or run other programs (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# Chunks with the code points of ITU-T H.273: cICP of a PNG, a `colr` box of an AVIF.
CODE_POINT_CHUNKS = {
    "PNG": re.compile(rb"cICP(?P<primaries>.)(?P<transfer>.)", re.DOTALL),
    "AVIF": re.compile(rb"colrnclx(?P<primaries>..)(?P<transfer>..)", re.DOTALL),
}
CODE_POINTS = "code_points"  # their name in the information of an image
LARGEST = "largest_level"  # the name of the level that is white
# The marker SIZ of a JPEG 2000, with the bits of the first component less 1 (T.800, A.5.1).
JPEG2000_SIZE = re.compile(rb"\xff\x4f\xff\x51.{38}(?P<bits>.)", re.DOTALL)
TIFF_HEADS = (b"II*\0", b"MM\0*")
# Numbers of tags of a TIFF (TIFF 6.0), and of their values.
PHOTOMETRIC, BITS, SAMPLE_FORMAT = 262, 258, 339
WHITE_IS_ZERO = 0
SIGNED = 2
HEADER = 1 << 16  # bytes, among which they stand
BT709 = 1
MOST_PIXELS = 1 << 26  # of an image (8192 x 8192); a hostile header may demand all memory
BACKGROUND = (255, 255, 255)  # behind transparent pixels: white, like the frame of `letterbox`
SRGB = ImageCms.createProfile("sRGB")
# Modes of Pillow that a colour profile of this space describes.
PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


@contextlib.contextmanager
def open_image_file(file: ImageFile) -> Iterator[Image.Image]:
    """Yield an image of which only the header has been read, and checked.

    Raises ValueError for what is no regular file, no image, or larger than MOST_PIXELS.
    """
    if not isinstance(file, str | Path):
        with _open(file) as image:
            yield image
        return

    with open_regular(file) as opened, _open(opened) as image:
        yield image


def _open(file: BinaryIO) -> Image.Image:
    """Return an image with a checked header. Raises ValueError."""
    Image.init()  # Pillow loads the readers of most formats only here
    try:
        # Pillow warns of images that are too large for us; without this filter it prints.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        if file.read(4) in TIFF_HEADS:
            raise ValueError(
                "a damaged TIFF, or one whose samples cannot be read: expected grey of 1, 2, 4, 8, "
                "12 or 16 bits or of 32-bit floats, or colours of 8 or 16 bits"
            ) from error
        raise ValueError(f"not an image of the formats {', '.join(FORMATS)}, or damaged") from error
    except Exception as error:  # there is no list of what decoders raise on damaged files
        raise ValueError(f"not an image that can be read: {error}") from error
    _check_size(image)
    if image.format == "GIF":
        _check_trailer(file)
    if image.format in CODE_POINT_CHUNKS:
        _read_code_points(image, file)
    if image.format in ("TIFF", "JPEG2000"):
        _read_largest_level(image, file)
    return image


def _read_largest_level(image: Image.Image, file: BinaryIO) -> None:
    """Store the level of a deep image that is white. Raises ValueError.

    Pillow gives the levels of a TIFF as they are stored, and shifts those of a JPEG 2000 to 8 or
    16 bits.
    """
    if image.format == "JPEG2000":
        found = JPEG2000_SIZE.search(_header(file))
        bits = (found["bits"][0] & 127) + 1 if found else 16
        if bits < 8:
            raise ValueError(f"a JPEG 2000 of {bits} bits a sample, expected 8 or more")
        image.info[LARGEST] = (1 << 16) - (1 << max(16 - bits, 0))
    elif isinstance(image, TiffImagePlugin.TiffImageFile) and _is_deep(image):
        bits = image.tag_v2[BITS][0]
        if image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            raise ValueError(f"a TIFF of {bits} bits a sample in which 0 is white: invert it")
        if bits <= 16:
            is_signed = image.tag_v2.get(SAMPLE_FORMAT, (0,))[0] == SIGNED
            image.info[LARGEST] = (1 << bits - is_signed) - 1


def _header(file: BinaryIO) -> bytes:
    """Return the first bytes of an open file, and stay where it is."""
    place = file.seek(0, io.SEEK_CUR)
    file.seek(0)
    header = file.read(HEADER)
    file.seek(place)
    return header


def _read_code_points(image: Image.Image, file: BinaryIO) -> None:
    """Store (transfer, primaries) of a PNG or AVIF; Pillow leaves them out."""
    found = CODE_POINT_CHUNKS[image.format or ""].search(_header(file))
    if found:
        image.info[CODE_POINTS] = (found["transfer"][-1], found["primaries"][-1])


def _check_trailer(file: BinaryIO) -> None:
    """Raise ValueError for a GIF without its last byte: it states no number of frames."""
    place = file.seek(0, io.SEEK_CUR)
    file.seek(-1, io.SEEK_END)
    last = file.read(1)
    file.seek(place)
    if last != b";":
        raise ValueError("truncated, or followed by other data: a GIF ends with a semicolon")


def _check_size(image: Image.Image) -> None:
    """Raise ValueError for an image of too many pixels."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{height}x{width} pixels, more than {MOST_PIXELS}")


def load(image: Image.Image) -> None:
    """Decode the pixels of an open image. Raises ValueError for damage."""
    _check_size(image)  # an animation may grow
    try:
        image.load()
    except Exception as error:  # there is no list of what decoders raise on damaged files
        raise ValueError(f"damaged or truncated: {error}") from error


def read_image(file: ImageFile) -> np.ndarray:
    """Return the image of a file, uint8 [h w 3]. Raises ValueError."""
    with _decoded(file) as image:
        return to_rgb(image)


@contextlib.contextmanager
def _decoded(file: ImageFile) -> Iterator[Image.Image]:
    """Yield the one image of a file, its pixels decoded. Raises ValueError."""
    with open_image_file(file) as image:
        if is_animated(image):
            raise ValueError("it is animated, expected one image")
        load(image)
        yield image


def is_animated(image: Image.Image) -> bool:
    """Return whether an open image has frames that follow one another in time.

    The further images of a multi-image JPEG are previews, gain maps and other views, those of a
    TIFF are pages. Raises ValueError for damage.
    """
    try:
        several = getattr(image, "is_animated", False)
    except Exception as error:  # there is no list of what decoders raise on damaged files
        raise ValueError(f"damaged or truncated: {error}") from error
    if several and image.format == "TIFF":
        raise ValueError("it has several pages, expected one image")
    return several and image.format != "MPO"


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return a decoded image as uint8 [h w 3]: upright, in sRGB, on BACKGROUND.

    Raises ValueError for levels or colours that cannot be read.
    """
    image = ImageOps.exif_transpose(image)
    if _is_deep(image):
        grey = np.rint(_deep_levels(image) * 255).astype(np.uint8)
        if "transparency" in image.info:  # the one level that is transparent
            grey[np.asarray(image) == image.info["transparency"]] = BACKGROUND[0]
        return np.repeat(grey[..., None], 3, axis=-1)

    has_alpha = image.has_transparency_data
    if has_alpha:
        image = image.convert("RGBA")
    rgb = _to_srgb(image)
    transfer, primaries = image.info.get(CODE_POINTS, (BT709, BT709))
    if transfer in TRANSFERS or primaries in GAMUTS:
        levels = np.asarray(rgb, np.uint16) * 257  # 8 bits as 16
        rgb = Image.fromarray(to_sdr(levels, transfer, primaries))
    if has_alpha:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, BACKGROUND), image.getchannel("A"))
    return np.asarray(rgb)


def read_map(file: ImageFile) -> np.ndarray:
    """Return the image of a file as a map, float32 [h w] in [0, 1].

    The mean of its channels. Grey levels of 16 bits and floats keep their precision. Raises
    ValueError.
    """
    with _decoded(file) as image:
        if _is_deep(image):
            return _deep_levels(ImageOps.exif_transpose(image))
        return to_unit(to_rgb(image)).mean(-1)


def _is_deep(image: Image.Image) -> bool:
    """Return whether the levels are integers of more than 8 bits, or floats."""
    return image.mode.startswith(("I", "F"))


def _deep_levels(image: Image.Image) -> np.ndarray:
    """Return the levels of a deep image as float32 [h w] in [0, 1].

    Floats that leave [0, 1] are scaled so that the least becomes 0 and the largest 1, as
    estimators of depth do. Raises ValueError for numbers that are not finite.
    """
    levels = np.asarray(image)
    if levels.dtype.kind == "f" and np.isfinite(levels).all():
        low = levels.min()
        span = np.float64(levels.max()) - low
        if span and (low < 0 or levels.max() > 1):
            levels = (levels - np.float64(low)) / span
    return to_unit(levels, image.info.get(LARGEST))


def to_unit(levels: np.ndarray, largest: int | None = None) -> np.ndarray:
    """Return levels as float32 in [0, 1].

    largest: the level that becomes 1. If it is not stated, uint8 is divided by 255, other
    integers by 65,535, and floats stay. Raises ValueError for numbers outside these ranges, or
    not finite.
    """
    if largest is None:
        largest = {"u": 65_535, "i": 65_535, "f": 1}.get(levels.dtype.kind)
        if levels.dtype == np.uint8:
            largest = 255
    if largest is None:
        raise ValueError(f"holds {levels.dtype}, expected floats or integers")
    if not np.isfinite(levels).all():
        raise ValueError("holds numbers that are not finite")
    if levels.min() < 0 or levels.max() > largest:
        found = f"{levels.min():.6g} to {levels.max():.6g}"
        raise ValueError(f"holds {found}, expected [0, {largest}]")
    return levels.astype(np.float32) / np.float32(largest)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Return the colours of an image in sRGB, its transparency left out."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = PROFILE_MODES[source.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (image.mode == "CMYK"):
            raise ValueError(f"pixels in {image.mode}")
        return ImageCms.buildTransform(source, SRGB, mode, "RGB").apply(image.convert(mode))
    except (ImageCms.PyCMSError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"a colour profile that cannot be applied: {error}") from error
