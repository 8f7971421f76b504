"""Image files as they are meant to be seen: upright, in sRGB, on white.

One rule for training and sampling; docs/inputs.md lists it. Nothing here names the file in its
errors: callers do.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

__all__ = [
    "MOST_PIXELS",
    "ImageFile",
    "is_animated",
    "load",
    "open_image_file",
    "read_image",
    "to_rgb",
    "to_unit",
]

# A path, or a file that is open for reading bytes.
ImageFile = str | Path | BinaryIO

# Pillow's other formats are rare, or run other programs (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
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

    if not Path(file).is_file():  # a pipe or a device would block, or fill the memory
        raise ValueError("there is no such file")
    with open(file, "rb") as opened, _open(opened) as image:
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
        raise ValueError(f"not an image of the formats {', '.join(FORMATS)}, or damaged") from error
    except Exception as error:  # there is no list of what decoders raise on damaged files
        raise ValueError(f"not an image that can be read: {error}") from error
    _check_size(image)
    if image.format == "GIF":
        _check_trailer(file)
    return image


def _check_trailer(file: BinaryIO) -> None:
    """Raise ValueError for a GIF without its last byte: it states no number of frames."""
    place = file.tell()
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
    with open_image_file(file) as image:
        if is_animated(image):
            raise ValueError("it is animated, expected one image")
        load(image)
        return to_rgb(image)


def is_animated(image: Image.Image) -> bool:
    """Return whether an open image has frames that follow one another in time.

    The further images of a multi-image JPEG are previews, gain maps and other views, those of a
    TIFF are pages. Raises ValueError for damage.
    """
    try:
        several = getattr(image, "n_frames", 1) > 1
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
    if image.mode.startswith(("I", "F")):
        grey = np.rint(to_unit(np.asarray(image)) * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)

    rgb = _to_srgb(image)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, BACKGROUND), alpha)
    return np.asarray(rgb)


def to_unit(levels: np.ndarray) -> np.ndarray:
    """Return levels as float32 in [0, 1].

    Integers up to 255 of uint8, and up to 65,535 of wider types, are divided by these numbers.
    Floats in [0, 1] stay; others are scaled so that the least becomes 0 and the largest 1, as
    estimators of depth do. Raises ValueError for other numbers.
    """
    if levels.dtype == np.uint8:
        return levels.astype(np.float32) / np.float32(255)
    low = levels.min()
    high = levels.max()
    if levels.dtype.kind in "iu":
        if low < 0 or high > 65_535:
            raise ValueError(f"holds integers from {low} to {high}, expected 0 to 65535")
        return levels.astype(np.float32) / np.float32(65_535)

    if not np.isfinite(levels).all():
        raise ValueError("holds numbers that are not finite")
    if low >= 0 and high <= 1:
        return levels.astype(np.float32)
    if low == high:
        raise ValueError(f"holds {low:.4g} everywhere, expected [0, 1] or a range to scale")
    scaled = (levels.astype(np.float64) - low) / (float(high) - float(low))
    return scaled.astype(np.float32)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Return the colours of an image in sRGB, its transparency left out."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGBA" if image.mode == "RGBa" else "RGB").convert("RGB")

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = PROFILE_MODES[source.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (image.mode == "CMYK"):
            raise ValueError(f"pixels in {image.mode}")
        return ImageCms.profileToProfile(image.convert(mode), source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"a colour profile that cannot be applied: {error}") from error
