"""The first and the last image of a clip, as a pretrained model reads them.

The makers of Wan and diffusers prepare an image in two ways, the rows of PREPROCESS. They differ in
the size of the frame, in the frame itself, and in what CLIP sees. References:
`wan/image2video.py`, `wan/first_last_frame2video.py` and `wan/modules/clip.py` of Wan-Video/Wan2.1;
`wan/textimage2video.py` of Wan-Video/Wan2.2; `WanImageToVideoPipeline` of diffusers.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vdx.generate.image_inputs import resize_image
from vdx.models.encoders.clip import MEAN, STD, preprocess
from vdx.types import Float

CUBIC = -0.75  # the parameter of torch's bicubic interpolation; that of Pillow is -0.5


class FrameSize(NamedTuple):
    """The size of a frame in pixels."""

    height: int
    width: int


class Preprocess(NamedTuple):
    """One way to prepare images."""

    # (area, unit, width and height of an image) -> the frame, of multiples of `unit`
    frame_size: Callable[[int, int, int, int], FrameSize]
    # (image, height, width) -> float32 [h w 3] in [-1, 1]
    frame: Callable[[Image.Image, int, int], np.ndarray]
    # (images, side) -> float32 [n side side 3], the pixels that CLIP reads
    clip_pixels: Callable[[Sequence[Image.Image], int], np.ndarray]


# As diffusers does


def rounded_size(area: int, unit: int, width: int, height: int) -> FrameSize:
    """Return about the image's proportions and at most about `area` pixels."""
    tall = math.sqrt(area * height / width)
    wide = math.sqrt(area * width / height)
    return FrameSize(max(1, round(tall) // unit) * unit, max(1, round(wide) // unit) * unit)


def crop_for_clip(images: Sequence[Image.Image], side: int) -> Float[np.ndarray, "n side side 3"]:
    """Return the centre of each image (see vdx.models.encoders.clip.preprocess)."""
    return preprocess([np.asarray(image) for image in images], side)


# As the makers do


def floored_size(area: int, unit: int, width: int, height: int) -> FrameSize:
    """Return the size that the makers compute from floats and floor.

    It may lose one `unit`: 832 x 480 leads to 464 x 832, because its height is 479.999...
    """
    aspect = height / width
    tall = math.sqrt(area * aspect)
    wide = math.sqrt(area / aspect)
    return FrameSize(max(1, int(tall // unit)) * unit, max(1, int(wide // unit)) * unit)


def nearest_size(area: int, unit: int, width: int, height: int) -> FrameSize:
    """Return the size within `area` whose proportions are nearest to the image's.

    Either the width or the height is floored first, and the other fills the area: Wan 2.2 TI2V 5B.
    """
    ratio = width / height
    wide = (area * ratio) ** 0.5
    tall = area / wide

    first = max(1, int(wide // unit)) * unit
    by_width = FrameSize(max(1, int(area / first // unit)) * unit, first)
    first = max(1, int(tall // unit)) * unit
    by_height = FrameSize(first, max(1, int(area / first // unit)) * unit)

    def distortion(size: FrameSize) -> float:
        other = size.width / size.height
        return max(ratio / other, other / ratio)

    return by_width if distortion(by_width) < distortion(by_height) else by_height


def squeeze(image: Image.Image, height: int, width: int) -> Float[np.ndarray, "h w 3"]:
    """Resize an image by `bicubic`; proportions are not kept."""
    pixels = np.asarray(image, np.float32) / 255
    return bicubic((pixels - 0.5) / 0.5, height, width)


def squeeze_for_clip(
    images: Sequence[Image.Image], side: int
) -> Float[np.ndarray, "n side side 3"]:
    """Squeeze each whole image into CLIP's square."""
    squares = np.stack([squeeze(image, side, side) for image in images])
    return (squares * 0.5 + 0.5 - MEAN) / STD


def crop_to_fill(image: Image.Image, height: int, width: int) -> Float[np.ndarray, "h w 3"]:
    """Resize an image until it covers the frame, and crop its centre."""
    scale = max(width / image.width, height / image.height)
    covering = (round(image.width * scale), round(image.height * scale))
    resized = image.resize(covering, Image.Resampling.LANCZOS)
    left = (resized.width - width) // 2
    top = (resized.height - height) // 2
    crop = resized.crop((left, top, left + width, top + height))
    return (np.asarray(crop, np.float32) / 255 - 0.5) / 0.5


def bicubic(x: Float[np.ndarray, "h w c"], height: int, width: int) -> np.ndarray:
    """Return [height width c] by cubic convolution without antialiasing (Keys 1981).

    The same as `torch.nn.functional.interpolate(mode="bicubic")`: pixel centres are half a pixel
    in, and pixels at the edge are repeated.
    """
    for axis, size in enumerate((height, width)):
        length = x.shape[axis]
        # Scale and positions are float32, as torch's: their rounding shows in the fifth digit.
        scale = float(np.float32(length) / np.float32(size))
        position = np.float32(scale * (np.arange(size) + 0.5) - 0.5)
        first = np.floor(position).astype(int)
        shape = [1] * x.ndim
        shape[axis] = size

        taps = np.zeros((), np.float32)
        for offset in range(-1, 3):
            weight = _cubic(np.abs(position - np.float32(first + offset)))
            index = np.clip(first + offset, 0, length - 1)
            taps = taps + weight.reshape(shape) * x.take(index, axis)
        x = taps
    return x


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Return the weight of a pixel at each distance in [0, 2].

    Keys 1981, equation 4 with a = CUBIC.
    """
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


PREPROCESS: dict[str, Preprocess] = {
    "diffusers": Preprocess(rounded_size, resize_image, crop_for_clip),
    "official": Preprocess(floored_size, squeeze, squeeze_for_clip),
    # The makers' way for a model that clamps its first frame (5B), which has no CLIP.
    "official_crop": Preprocess(nearest_size, crop_to_fill, squeeze_for_clip),
}
CHOICES = ("official", "diffusers")  # what a request may name


def preprocess_for(name: str, clamps_first_frame: bool) -> Preprocess:
    """Return the way of preparing images that a request names, for a kind of model."""
    if name == "official" and clamps_first_frame:
        return PREPROCESS["official_crop"]
    return PREPROCESS[name]
