"""One rule for frames, maps and cameras: scaled to cover a size, then cropped at the centre."""

import numpy as np
from PIL import Image

__all__ = ["covering", "resize"]

Box = tuple[float, float, float, float]


def covering(old: tuple[int, int], height: int, width: int) -> tuple[Box, float]:
    """((left, top, right, bottom) of what is kept, in old pixels; new pixels to an old one)."""
    h, w = old
    scale = max(height / h, width / w)
    crop_h, crop_w = height / scale, width / scale
    left, top = (w - crop_w) / 2, (h - crop_h) / 2
    return (left, top, min(left + crop_w, w), min(top + crop_h, h)), scale


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames uint8 [t h w 3], or maps float32 [t h w c], at [t height width c].

    Pictures are resized bicubically, maps linearly: those must not overshoot.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    box, _ = covering(frames.shape[1:3], height, width)
    if frames.dtype == np.uint8:
        return np.stack(
            [
                np.asarray(
                    Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box)
                )
                for frame in frames
            ]
        )
    return np.stack(
        [
            np.stack(
                [
                    np.asarray(
                        Image.fromarray(np.ascontiguousarray(channel)).resize(
                            (width, height), Image.Resampling.BILINEAR, box
                        )
                    )
                    for channel in np.moveaxis(frame, -1, 0)
                ],
                axis=-1,
            )
            for frame in frames
        ]
    )
