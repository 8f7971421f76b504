"""Encoding of H.264: the same frames give the same bytes."""

from fractions import Fraction
from typing import Any

import av
import numpy as np

__all__ = ["X264", "add_stream", "yuv_frame"]

BT709 = 1  # the number of this colour matrix, its primaries and its curve in H.264
LIMITED = 1  # the range of luma in H.264 that every player expects: 16 to 235
# Constant rate factor 12 is visually lossless. x264's macroblock tree, by default on, makes
# different bytes of the same frames from time to time.
X264 = {"crf": "12", "preset": "medium", "mbtree": "0"}


def add_stream(
    out: Any, rate: Fraction, height: int, width: int, options: dict[str, str] = X264
) -> Any:
    """Add an H.264 stream to a container of PyAV, its colours marked as BT.709.

    options: of x264.
    """
    stream = out.add_stream("libx264", rate=rate, options=options)
    stream.height = height
    stream.width = width
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    codec.time_base = 1 / rate
    codec.color_range = LIMITED
    codec.colorspace = BT709
    codec.color_primaries = BT709
    codec.color_trc = BT709
    return stream


def yuv_frame(frame: np.ndarray, number: int, rate: Fraction) -> av.VideoFrame:
    """Return uint8 [h w 3] as frame `number` of a 4:2:0 video."""
    rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
    yuv = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
    yuv.pts = number
    yuv.time_base = 1 / rate
    return yuv
