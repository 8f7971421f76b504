"""Decoded video frames as they are meant to be seen: upright, square pixels, SDR, on white.

What a file states of its frames is applied, or the file is refused. docs/inputs.md lists it.
"""

from fractions import Fraction

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from PIL import Image

from vdx.data.images import BACKGROUND, MOST_PIXELS
from vdx.data.tone_mapping import GAMUTS, TRANSFERS, to_sdr

__all__ = ["decoder_of", "display_pixels"]

# Numbers of ITU-T H.273. Matrices: that of swscale for each matrix that it has.
UNTAGGED = (0, 2, 3)
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
BT709 = 1
BT601 = 5
BT2020 = 9
# Primaries near those of BT.709, read as these: BT.601 in both forms, SMPTE 240M, EBU 3213.
PRIMARIES = (1, 5, 6, 7, 22)
# Transfers of SDR: they differ in the camera, not on the display (BT.1886), or by little.
SDR = (1, 4, 5, 6, 7, 11, 12, 13, 14, 15)

LIMITED = 1  # AVCOL_RANGE_MPEG: levels from 16 to 235 of 255
# swscale's default is off by up to 3 of 255 levels for 10 bits. These are its flags for bilinear
# chroma, chroma at every pixel, and exact rounding.
ACCURATE = 0x2 | 0x2000 | 0x40000
# Decoders with alpha; FFmpeg's own ones of VP8 and VP9 leave it out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def decoder_of(stream: VideoStream) -> VideoCodecContext:
    """Return the decoder of a stream: its own, or one that also decodes the alpha there is."""
    if not _has_alpha_stream(stream):
        return stream.codec_context
    codec = stream.codec_context
    if codec.name not in ALPHA_DECODERS:
        raise ValueError(f"alpha in a stream of {codec.name}, which vdx cannot decode")
    decoder = VideoCodecContext.create(ALPHA_DECODERS[codec.name], "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.options = codec.options
    decoder.thread_count = codec.thread_count
    return decoder


def _has_alpha_stream(stream: VideoStream) -> bool:
    """Return whether alpha is a second stream inside that of a WebM."""
    return stream.metadata.get("alpha_mode") == "1"


def display_pixels(frame: av.VideoFrame, stream: VideoStream) -> np.ndarray:
    """Return a decoded frame as uint8 [h w 3]: upright, square pixels, SDR, on BACKGROUND.

    Raises ValueError for what cannot be shown like this.
    """
    # Levels of R'G'B', and of alpha.
    transfer, primaries, matrix = _colours(frame, stream)
    is_sdr = transfer not in TRANSFERS and primaries not in GAMUTS
    levels = _levels(frame, matrix, 8 if is_sdr else 16)
    rgb = levels[..., :3]
    if not is_sdr:
        rgb = to_sdr(rgb, transfer, primaries)

    if levels.shape[-1] == 4:
        rgb = _composite(rgb, levels[..., 3])
    elif _has_alpha_stream(stream):
        raise ValueError("transparent frames whose alpha was not decoded")
    return _upright(_square(rgb, stream.sample_aspect_ratio), frame)


def _colours(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int, int]:
    """Return transfer, primaries and matrix of a frame. Raises ValueError for unknown ones."""
    codec = stream.codec_context
    transfer = codec.color_trc
    primaries = codec.color_primaries
    matrix = int(frame.colorspace)
    if transfer not in (*UNTAGGED, *SDR, *TRANSFERS):
        raise ValueError(f"transfer characteristics {transfer} of H.273, which vdx cannot convert")
    if primaries not in (*UNTAGGED, *PRIMARIES, *GAMUTS):
        raise ValueError(f"colour primaries {primaries} of H.273, which vdx cannot convert")
    if matrix not in (*UNTAGGED, *MATRICES):
        raise ValueError(f"matrix coefficients {matrix} of H.273, which vdx cannot convert")

    is_dolby_vision = frame.side_data.get("DOVI_METADATA") is not None
    if is_dolby_vision and transfer in UNTAGGED:
        raise ValueError("Dolby Vision of profile 5, whose colours no other standard describes")

    # What is not tagged.
    if primaries in UNTAGGED and transfer in TRANSFERS:
        primaries = BT2020
    if matrix in UNTAGGED:
        matrix = _usual_matrix(frame, primaries)
    return transfer, primaries, MATRICES[matrix]


def _usual_matrix(frame: av.VideoFrame, primaries: int) -> int:
    """Return the matrix of an untagged frame, by the rule of the player mpv.

    `mp_csp_guess_colorspace`: BT.709 from a width of 1280 or above a height of 576, else BT.601.
    """
    if primaries == BT2020:
        return BT2020
    if frame.width >= 1280 or frame.height > 576:
        return BT709
    return BT601


def _levels(frame: av.VideoFrame, matrix: int, bits: int) -> np.ndarray:
    """Return R'G'B' with the alpha that there is, uint8 or uint16 [h w 3 or 4], full range."""
    components = frame.format.components
    has_alpha = frame.format.has_palette or any(c.is_alpha for c in components)
    formats = {8: ("rgb24", "rgba"), 16: ("rgb48le", "rgba64le")}
    options = {"src_colorspace": matrix}
    if max(c.bits for c in components) > 8:
        options["interpolation"] = ACCURATE
    levels = frame.to_ndarray(format=formats[bits][has_alpha], **options)

    # swscale takes all grey formats for full range.
    if frame.format.name.startswith("gray") and frame.color_range == LIMITED:
        black = 16 << (bits - 8)
        span = 219 << (bits - 8)
        top = (1 << bits) - 1
        unit = (levels.astype(np.float32) - black) / span
        levels = np.rint(np.clip(unit, 0, 1) * top).astype(levels.dtype)
    return levels


def _composite(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return uint8 [h w 3] on BACKGROUND. alpha: uint8 or uint16 [h w]."""
    opacity = (alpha / np.float32(np.iinfo(alpha.dtype).max))[..., None]
    background = np.array(BACKGROUND, np.float32)
    return np.rint(rgb * opacity + background * (1 - opacity)).astype(np.uint8)


def _square(rgb: np.ndarray, ratio: Fraction | None) -> np.ndarray:
    """Return frames with square pixels; the side that is too short is resampled bicubically.

    ratio: width of a pixel to its height. Raises ValueError for more than MOST_PIXELS.
    """
    if not ratio or ratio <= 0:  # not stated
        return rgb
    height, width = rgb.shape[:2]
    size = (width, round(height / ratio))
    if ratio > 1:
        size = (round(width * ratio), height)
    if size == (width, height):
        return rgb
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"pixels of {ratio}: frames of {size[1]}x{size[0]} pixels are too large")
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))


def _upright(rgb: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Return pixels turned and mirrored as the display matrix of a frame states.

    The matrix [a b u; c d v; x y w] of ISO/IEC 14496-12 sends (p, q), q down, to
    (a p + c q, b p + d q). Raises ValueError if that is not quarter turns and mirrors.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return rgb
    ((a, b), (c, d)) = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / 65_536

    # Entries off the axes are at most rounding.
    straight = min(abs(a), abs(d))
    turned = min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= straight / 100:
        return np.ascontiguousarray(rgb[:: _sign(d), :: _sign(a)])
    if max(abs(a), abs(d)) <= turned / 100:
        return np.ascontiguousarray(rgb.swapaxes(0, 1)[:: _sign(b), :: _sign(c)])
    raise ValueError(f"a display matrix [{a:.3g} {b:.3g}; {c:.3g} {d:.3g}] of no quarter turn")


def _sign(x: float) -> int:
    """Return 1 or -1."""
    return 1 if x > 0 else -1
