"""Decoded video frames as players show them: upright, square pixels, SDR.

What a file states of its frames is applied, or the file is refused. docs/inputs.md lists it.
"""

from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from PIL import Image

from vdx.data.images import BACKGROUND, MOST_PIXELS
from vdx.data.mp4_boxes import Aperture
from vdx.data.tone_mapping import GAMUTS, TRANSFERS, to_sdr

__all__ = ["decoder_of", "display_matrix", "display_pixels"]

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
    """Return the decoder of a stream, one that also decodes its alpha."""
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


def display_matrix(stream: VideoStream, packet: "av.Packet[VideoStream]") -> bytes | None:
    """Return the display matrix of a stream that `decoder_of` decodes otherwise.

    FFmpeg's own decoder copies it from the header to its frames. packet: a key packet.
    """
    for frame in stream.codec_context.decode(packet):
        return _matrix_of(frame)
    return None


def _matrix_of(frame: av.VideoFrame) -> bytes | None:
    """Return the display matrix of a frame."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else bytes(data)


def _has_alpha_stream(stream: VideoStream) -> bool:
    """Return whether alpha is a second stream inside that of a WebM."""
    return stream.metadata.get("alpha_mode") == "1"


def display_pixels(
    frame: av.VideoFrame,
    stream: VideoStream,
    aperture: Aperture | None = None,
    matrix: bytes | None = None,
) -> np.ndarray:
    """Return a decoded frame as uint8 [h w 3], as the file states it.

    Upright, with square pixels, in SDR, on BACKGROUND. aperture: the clean aperture. matrix: the
    display matrix, if the frame has none of its own. Raises ValueError for what cannot be shown
    like this.
    """
    if frame.interlaced_frame and stream.codec_context.name == "hevc":
        raise ValueError("interlaced HEVC, whose fields look like frames: deinterlace it")

    # Levels of R'G'B', and of alpha.
    transfer, primaries, coefficients = _colours(frame, stream)
    is_sdr = transfer not in TRANSFERS and primaries not in GAMUTS
    levels = _levels_of_lines(frame, coefficients, 8 if is_sdr else 16)
    rgb = levels[..., :3]
    if not is_sdr:
        rgb = to_sdr(rgb, transfer, primaries)

    if levels.shape[-1] == 4:
        rgb = _composite(rgb, levels[..., 3])
    elif _has_alpha_stream(stream):
        raise ValueError("transparent frames whose alpha was not decoded")
    rgb = _square(_clean(rgb, aperture), stream.sample_aspect_ratio)
    return _upright(rgb, _matrix_of(frame) or matrix)


def _colours(frame: av.VideoFrame, stream: VideoStream) -> tuple[int, int, int]:
    """Return transfer, primaries and matrix of a frame. Raises ValueError."""
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


def _levels_of_lines(frame: av.VideoFrame, matrix: int, bits: int) -> np.ndarray:
    """Return R'G'B' and any alpha of one moment, as `_levels` does.

    The lines of an interlaced frame are of two moments. The top field, lines 0, 2 and so on,
    stays; each other line becomes the mean of its neighbours.
    """
    if not frame.interlaced_frame:
        return _levels(frame, matrix, bits)

    kept = _levels(_top_field(frame), matrix, bits)
    below = np.concatenate([kept[1:], kept[-1:]]).astype(np.uint32)
    levels = np.empty((frame.height, *kept.shape[1:]), kept.dtype)
    levels[::2] = kept
    levels[1::2] = ((kept + below + 1) // 2)[: frame.height // 2]
    return levels


def _top_field(frame: av.VideoFrame) -> av.VideoFrame:
    """Return every second line of a frame, from the first on."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1)
    )
    graph.link_nodes(source, graph.add("field", "type=top"), graph.add("buffersink")).configure()
    graph.push(frame)
    field = graph.pull()
    assert isinstance(field, av.VideoFrame)
    return field


def _levels(frame: av.VideoFrame, matrix: int, bits: int) -> np.ndarray:
    """Return R'G'B' and any alpha, uint8 or uint16 [h w 3 or 4], full range."""
    components = frame.format.components
    has_alpha = frame.format.has_palette or any(c.is_alpha for c in components)
    formats = {8: ("rgb24", "rgba"), 16: ("rgb48le", "rgba64le")}
    interpolation = ACCURATE if max(c.bits for c in components) > 8 else None
    levels: np.ndarray = frame.to_ndarray(
        format=formats[bits][has_alpha], src_colorspace=matrix, interpolation=interpolation
    )

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


def _clean(rgb: np.ndarray, aperture: Aperture | None) -> np.ndarray:
    """Return the clean aperture, rounded to whole pixels. Raises ValueError."""
    if aperture is None:
        return rgb
    width, height = map(round, aperture.size)
    left, top = (
        round((whole - part) / 2 + offset)
        for whole, part, offset in zip(
            (rgb.shape[1], rgb.shape[0]), aperture.size, aperture.offset, strict=True
        )
    )
    inside = 0 <= left < left + width <= rgb.shape[1] and 0 <= top < top + height <= rgb.shape[0]
    if not inside:
        raise ValueError(
            f"a clean aperture of {height}x{width} pixels at {top}, {left} in frames of "
            f"{rgb.shape[0]}x{rgb.shape[1]}"
        )
    return rgb[top : top + height, left : left + width]


def _square(rgb: np.ndarray, ratio: Fraction | None) -> np.ndarray:
    """Return pixels resampled bicubically to squares; the shorter side grows.

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


def _upright(rgb: np.ndarray, matrix: bytes | None) -> np.ndarray:
    """Return pixels turned and mirrored as a display matrix states.

    The matrix [a b u; c d v; x y w] of ISO/IEC 14496-12 sends (p, q), q down, to
    (a p + c q, b p + d q). Raises ValueError if that is not quarter turns and mirrors.
    """
    if matrix is None:
        return rgb
    ((a, b), (c, d)) = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2] / 65_536

    # Entries off the axes are at most rounding.
    upright = min(abs(a), abs(d))
    quarter = min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= upright / 100:
        return np.ascontiguousarray(rgb[:: _sign(d), :: _sign(a)])
    if max(abs(a), abs(d)) <= quarter / 100:
        return np.ascontiguousarray(rgb.swapaxes(0, 1)[:: _sign(b), :: _sign(c)])
    raise ValueError(f"a display matrix [{a:.3g} {b:.3g}; {c:.3g} {d:.3g}] of no quarter turn")


def _sign(x: float) -> int:
    """Return 1 or -1."""
    return 1 if x > 0 else -1
