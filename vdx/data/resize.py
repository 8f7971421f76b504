"""One resizing rule for frames, maps and cameras: cover a size, crop the centre."""

import numpy as np
from PIL import Image

__all__ = ["covering", "resize"]

Box = tuple[float, float, float, float]


def covering(old: tuple[int, int], height: int, width: int) -> tuple[Box, float]:
    """Return the crop (left, top, right, bottom) in old pixels, and the scale.

    old: (h, w) in pixels. The scale is the number of new pixels to an old one.
    """
    h, w = old
    scale = max(height / h, width / w)
    crop_h = height / scale
    crop_w = width / scale
    left = (w - crop_w) / 2
    top = (h - crop_h) / 2
    return (left, top, min(left + crop_w, w), min(top + crop_h, h)), scale


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return frames uint8 [t h w 3] or maps float32 [t h w c] at [t height width c].

    Images are resized bicubically. Maps are resized linearly, so that they do not overshoot.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    box, _ = covering(frames.shape[1:3], height, width)
    size = (width, height)  # as Pillow takes it

    if frames.dtype == np.uint8:
        return np.stack(
            [_resize_plane(frame, size, Image.Resampling.BICUBIC, box) for frame in frames]
        )

    # [t h w c], but Pillow resizes float maps one channel at a time.
    channels = [
        np.stack([_resize_plane(plane, size, Image.Resampling.BILINEAR, box) for plane in planes])
        for planes in np.moveaxis(frames, -1, 0)  # [t h w]
    ]
    return np.stack(channels, axis=-1)


def _resize_plane(
    plane: np.ndarray, size: tuple[int, int], filter: Image.Resampling, box: Box
) -> np.ndarray:
    """Return a box of an image, resized.

    plane: uint8 [h w 3] or float32 [h w]. size: (width, height).
    """
    image = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(image.resize(size, filter, box))
