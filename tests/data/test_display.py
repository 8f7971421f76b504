"""Decoded frames are shown as players show them: colours, alpha, pixel shape, orientation."""

import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

from vdx.data.display import display_pixels
from vdx.data.record import BadRecord
from vdx.data.resize import resize
from vdx.data.video_files import video_record
from vdx.generate.video_io import frames_at, read_video

RNG = np.random.default_rng(0)
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # Kr, Kb
FULL, LIMITED = 2, 1


def stream(transfer=2, primaries=2, ratio=None, **metadata):
    """Return what a stream states of all its frames."""
    codec = SimpleNamespace(color_trc=transfer, color_primaries=primaries)
    return SimpleNamespace(codec_context=codec, sample_aspect_ratio=ratio, metadata=metadata)


def frame_of(planes, format, matrix=2, color_range=LIMITED):
    """Return a frame of these planes, [h w] each."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, format)
    for plane, levels in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // levels.itemsize), levels.dtype)
        rows[:, :width] = levels
        plane.update(rows.tobytes())
    frame.colorspace, frame.color_range = matrix, color_range
    return frame


def to_yuv(rgb, matrix, color_range, bits):
    """Return Y'CbCr planes of R'G'B' in [0, 1], by BT.601, BT.709 and BT.2020, section 3."""
    kr, kb = LUMA[matrix]
    r, g, b = np.moveaxis(rgb, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    unit = 1 << (bits - 8)
    if color_range == LIMITED:
        levels = [219 * y + 16, 224 * cb + 128, 224 * cr + 128]
    else:
        unit = ((1 << bits) - 1) / 255
        levels = [255 * y, 255 * cb + 128 * 257 / 257, 255 * cr + 128]
        levels = [levels[0], *(255 * c + (1 << (bits - 1)) / unit for c in (cb, cr))]
    dtype = np.uint8 if bits == 8 else np.uint16
    top = (1 << bits) - 1
    return [np.clip(np.rint(level * unit), 0, top).astype(dtype) for level in levels]


@pytest.mark.parametrize("matrix", LUMA)
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("format, bits", [("yuv444p", 8), ("yuv444p10le", 10), ("yuv444p12le", 12)])
def test_matrix_range_and_depth_are_those_of_the_file(matrix, color_range, format, bits):
    rgb = RNG.random((64, 64, 3))
    planes = to_yuv(rgb, matrix, color_range, bits)
    got = display_pixels(frame_of(planes, format, matrix, color_range), stream())
    assert np.abs(got - 255 * rgb).max() <= 3


@pytest.mark.parametrize(
    "size, matrix",
    [
        ((480, 64), 5),
        ((576, 64), 5),
        ((578, 64), 1),
        ((720, 64), 1),
        ((64, 1280), 1),
        ((64, 1278), 5),
    ],
)
def test_an_untagged_matrix_is_that_of_the_size(size, matrix):
    rgb = np.broadcast_to([0.8, 0.2, 0.3], (*size, 3))
    frame = frame_of(to_yuv(rgb, matrix, LIMITED, 8), "yuv444p")
    assert np.abs(display_pixels(frame, stream()) - 255 * rgb).max() <= 3


def test_untagged_hdr_is_bt2020():
    rgb = np.broadcast_to([0.55, 0.5, 0.45], (64, 64, 3))
    frames = [frame_of(to_yuv(rgb, 9, LIMITED, 10), "yuv444p10le", matrix) for matrix in (2, 9)]
    untagged = display_pixels(frames[0], stream(16))
    np.testing.assert_array_equal(untagged, display_pixels(frames[1], stream(16, 9)))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_grey_ramps_are_scaled_and_limited_range_is_applied(bits):
    top = (1 << bits) - 1
    ramp = np.linspace(0, top, 4096).reshape(64, 64)
    levels = np.rint(ramp).astype(np.uint8 if bits == 8 else np.uint16)
    format = "gray" if bits == 8 else f"gray{bits}le"
    got = display_pixels(frame_of([levels], format, color_range=FULL), stream())[..., 0]
    assert np.abs(got - 255 * ramp / top).max() <= 1.5
    assert (np.diff(got.ravel().astype(int)) >= 0).all() and np.ptp(got) == 255

    scale = 1 << (bits - 8)
    limited = np.clip((ramp - 16 * scale) / (219 * scale), 0, 1)
    got = display_pixels(frame_of([levels], format, color_range=LIMITED), stream())[..., 0]
    assert np.abs(got - 255 * limited).max() <= 2


@pytest.mark.parametrize(
    "colour, message",
    [
        ({"transfer": 8}, "transfer characteristics 8"),
        ({"primaries": 11}, "colour primaries 11"),
        ({"matrix": 14}, "matrix coefficients 14"),
        ({"matrix": 8}, "matrix coefficients 8"),
    ],
)
def test_colours_that_cannot_be_converted_are_refused(colour, message):
    matrix = colour.pop("matrix", 2)
    frame = frame_of(to_yuv(np.zeros((8, 8, 3)), 5, LIMITED, 8), "yuv444p", matrix)
    with pytest.raises(ValueError, match=message):
        display_pixels(frame, stream(**colour))


# Alpha ---------------------------------------------------------------------------------------


def on_white(colours, opacity):
    return colours * opacity[..., None] + 255 * (1 - opacity[..., None])


def test_every_alpha_is_composited_on_white():
    colours = RNG.integers(0, 256, (256, 32, 3), np.uint8)
    alpha = np.arange(256, dtype=np.uint8)[:, None].repeat(32, 1)
    for format, order in (("rgba", [0, 1, 2, 3]), ("bgra", [2, 1, 0, 3]), ("argb", [3, 0, 1, 2])):
        pixels = np.dstack([colours, alpha])[..., order]
        got = display_pixels(av.VideoFrame.from_ndarray(pixels, format), stream())
        assert np.abs(got - on_white(colours, alpha / 255)).max() <= 0.5 + 1e-5


def write(path, frames, codec, format, **options):
    """Write frames [h w 3 or 4] without loss; options: of the stream."""
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=10, options=options.pop("settings", {}))
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = format
        if "ratio" in options:
            video.codec_context.sample_aspect_ratio = options["ratio"]
        if "turn" in options:
            video.set_display_rotation(*options["turn"])
        for name in ("color_trc", "color_primaries", "colorspace"):
            if name in options:
                setattr(video.codec_context, name, options[name])
        for number, frame in enumerate(frames):
            image = av.VideoFrame.from_ndarray(frame, "rgba" if frame.shape[-1] == 4 else "rgb24")
            image = image.reformat(format=format)
            image.pts = number
            out.mux(video.encode(image))
        out.mux(video.encode(None))
    return path


def read(path):
    """Return the first frame, as training and as sampling read it."""
    trained = video_record("a", "", lambda: str(path)).read(np.zeros(1))[0]
    sampled = next(frames_at(path, 1.0))
    np.testing.assert_array_equal(trained, sampled)
    np.testing.assert_array_equal(trained, read_video(path)[0][0])
    return trained


CUTOUT = np.zeros((64, 64, 4), np.uint8)
CUTOUT[16:48, 16:48] = (200, 60, 60, 255)


@pytest.mark.parametrize(
    "name, codec, format, off",
    [
        ("a.mov", "png", "rgba", 0),
        ("a.mov", "qtrle", "argb", 0),
        ("a.mkv", "ffv1", "bgra", 0),
        ("a.mov", "prores_ks", "yuva444p10le", 4),
        ("a.webm", "libvpx-vp9", "yuva420p", 10),
    ],
)
def test_hidden_colours_do_not_show(tmp_path, name, codec, format, off):
    green = CUTOUT.copy()
    green[green[..., 3] == 0, :3] = (0, 255, 0)
    options = {"settings": {"lossless": "1"}} if codec == "libvpx-vp9" else {}
    for image in (CUTOUT, green):
        got = read(write(tmp_path / name, [image] * 3, codec, format, **options)).astype(int)
        away = np.abs(got - on_white(image[..., :3], image[..., 3] / 255))
        assert away[:12].max() <= 1 and away[20:44, 20:44].max() <= off


def test_alpha_that_is_not_decoded_is_refused():
    frame = frame_of(to_yuv(np.zeros((8, 8, 3)), 5, LIMITED, 8), "yuv444p")
    with pytest.raises(ValueError, match="alpha was not decoded"):
        display_pixels(frame, stream(alpha_mode="1"))


# Pixel shape and orientation -------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["16/9", "4/3", "10/11", "12/11", "8/9", "64/45", "1/2", "32/27"])
def test_a_disc_stays_a_disc(ratio):
    ratio = Fraction(ratio)
    y, x = np.mgrid[:96, :128]
    disc = np.hypot((x - 63.5) * float(ratio), y - 47.5) < 30
    levels = np.where(disc, 230, 20).astype(np.uint8)[..., None].repeat(3, 2)
    got = display_pixels(av.VideoFrame.from_ndarray(levels, "rgb24"), stream(ratio=ratio))
    height, width = got.shape[:2]
    assert abs(Fraction(width, height) / Fraction(128, 96) / ratio - 1) < 0.01
    assert height >= 96 and width >= 128  # nothing is lost
    seen = got[..., 0] > 128
    assert abs(int(seen.any(0).sum()) - int(seen.any(1).sum())) <= 1


@pytest.mark.parametrize("ratio", [None, Fraction(0), Fraction(1), Fraction(999, 1000)])
def test_square_pixels_stay(ratio):
    pixels = RNG.integers(0, 256, (32, 48, 3), np.uint8)
    got = display_pixels(av.VideoFrame.from_ndarray(pixels, "rgb24"), stream(ratio=ratio))
    np.testing.assert_array_equal(got, pixels)


def test_a_hostile_pixel_shape_is_refused():
    frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
    with pytest.raises(ValueError, match="too large"):
        display_pixels(frame, stream(ratio=Fraction(65535)))


SMOOTH = np.dstack([np.add.outer(np.arange(32), k * np.arange(48)) for k in (1, 2, 3)]).astype(
    np.uint8
)


@pytest.mark.parametrize("name", ["a.mov", "a.mp4", "a.mkv"])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)])
def test_every_display_matrix_is_applied(tmp_path, name, turns, mirrored):
    codec, format = ("ffv1", "bgr0") if name == "a.mkv" else ("png", "rgb24")
    path = write(tmp_path / name, [SMOOTH] * 2, codec, format, turn=(90 * turns, *mirrored))
    expected = np.rot90(SMOOTH, turns)
    if mirrored[0]:
        expected = expected[:, ::-1]
    if mirrored[1]:
        expected = expected[::-1]
    np.testing.assert_array_equal(read(path), expected)


def test_an_oblique_display_matrix_is_refused(tmp_path):
    path = write(tmp_path / "a.mov", [SMOOTH] * 2, "png", "rgb24", turn=(30, False, False))
    with pytest.raises(BadRecord, match="no quarter turn"):
        read(path)


def test_pixel_shape_comes_before_the_turn(tmp_path):
    turned = {"ratio": Fraction(2), "turn": (90, False, False)}
    got = read(write(tmp_path / "a.mov", [SMOOTH] * 2, "png", "rgb24", **turned))
    assert got.shape == (96, 32, 3)
    straight = read(write(tmp_path / "b.mov", [SMOOTH] * 2, "png", "rgb24", ratio=Fraction(2)))
    np.testing.assert_array_equal(got, np.rot90(straight))
    assert np.abs(resize(straight[None], 32, 48)[0].astype(int)[4:-4, 4:-4]).any()


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_videos_with_alpha_are_turned_too(tmp_path, codec):
    corner = np.zeros((32, 64, 4), np.uint8)
    corner[:16, :16] = (0, 0, 0, 255)
    name, settings = "a.webm", {"auto-alt-ref": "0", "crf": "4"}
    options = {"settings": settings, "turn": (90, False, False)}
    got = read(write(tmp_path / name, [corner] * 3, codec, "yuva420p", **options))
    dark = got[..., 0] < 128
    np.testing.assert_array_equal(dark, np.rot90(corner[..., 3] == 255))


def with_aperture(path, numbers):
    """Write a clean aperture into the sample entry of a mov whose index is at the end."""
    data = bytearray(path.read_bytes())
    clap = struct.pack(">I4sIIIIiIiI", 40, b"clap", *numbers)
    end = data.rfind(b"png ") - 4 + int.from_bytes(data[data.rfind(b"png ") - 4 :][:4])
    data[end:end] = clap
    for name in (b"png ", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        place = data.rfind(name, 0, end) - 4
        length = int.from_bytes(data[place : place + 4])
        data[place : place + 4] = (length + len(clap)).to_bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "numbers, rows, columns",
    [
        ((32, 1, 24, 1, 0, 1, 0, 1), slice(4, 28), slice(8, 40)),
        ((32, 1, 24, 1, -8, 1, 4, 1), slice(8, 32), slice(0, 32)),
        ((63, 2, 20, 1, 1, 4, 0, 1), slice(6, 26), slice(8, 40)),  # of 31.5 pixels from 8.5 on
        ((48, 1, 32, 1, 0, 1, 0, 1), slice(0, 32), slice(0, 48)),
    ],
)
def test_a_clean_aperture_is_cut_out_before_the_turn(tmp_path, numbers, rows, columns):
    path = write(tmp_path / "a.mov", [SMOOTH] * 2, "png", "rgb24", turn=(90, False, False))
    with_aperture(path, numbers)
    np.testing.assert_array_equal(read(path), np.rot90(SMOOTH[rows, columns]))


def test_a_clean_aperture_outside_of_the_frame_is_refused(tmp_path):
    path = write(tmp_path / "a.mov", [SMOOTH] * 2, "png", "rgb24")
    with_aperture(path, (32, 1, 24, 1, 9, 1, 0, 1))
    with pytest.raises(BadRecord, match="a clean aperture of 24x32 pixels at 4, 17 in frames of"):
        read(path)


# Interlacing -----------------------------------------------------------------------------------


FIELDS = np.empty((48, 64, 3), np.uint8)  # two moments: dark above, then bright
FIELDS[::2] = np.linspace(40, 100, 24).astype(np.uint8)[:, None, None]
FIELDS[1::2] = 220


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_an_interlaced_frame_shows_its_top_field(tmp_path, order):
    settings = {"x264-params": f"{order}=1", "crf": "1"}
    path = write(tmp_path / "a.mp4", [FIELDS] * 3, "libx264", "yuv444p", settings=settings)
    got = read(path).astype(int)
    assert np.abs(got[::2] - FIELDS[::2]).max() <= 2
    between = (FIELDS[:-2:2].astype(int) + FIELDS[2::2]) / 2
    assert np.abs(got[1:-1:2] - between).max() <= 2
    assert np.abs(got[-1] - FIELDS[-2]).max() <= 2


def test_the_lines_of_a_progressive_frame_stay(tmp_path):
    path = write(tmp_path / "a.mkv", [FIELDS] * 2, "ffv1", "bgr0")
    np.testing.assert_array_equal(read(path), FIELDS)


def test_hevc_of_fields_is_refused(tmp_path):
    settings = {"x265-params": "interlace=tff:log-level=none:pools=1:frame-threads=1"}
    path = write(tmp_path / "a.mp4", [FIELDS] * 4, "libx265", "yuv420p", settings=settings)
    with pytest.raises(BadRecord, match="interlaced HEVC"):
        read(path)


@pytest.mark.parametrize("transfer, white", [(16, 0.58), (18, 0.75)])
def test_hdr_files_are_tone_mapped_and_their_twins_in_sdr_are_not(tmp_path, transfer, white):
    flat = [np.full((64, 64, 3), round(255 * white), np.uint8)] * 2
    tags = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9}
    hdr = read(write(tmp_path / "a.mkv", flat, "ffv1", "yuv420p10le", **tags))
    sdr = read(write(tmp_path / "b.mkv", flat, "ffv1", "yuv420p10le"))
    assert 224 <= hdr.mean() <= 236 and abs(sdr.mean() - flat[0].mean()) <= 2
