"""Every measure on arrays whose answer is exact or planted, each with its control."""

import itertools
import sys
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.data.curation.borders import content_box
from vdx.data.curation.cell import Cell
from vdx.data.curation.look import LookSettings, look
from vdx.data.curation.soundtrack import RATE, audio_spans
from vdx.data.curation.table import MEASURES
from vdx.data.curation.text_reader import TextLine

HEIGHT, WIDTH = 96, 160
FPS = 24
FRAMES = 12
RNG = np.random.default_rng(0)
# A texture of several scales, larger than a frame.
TEXTURE = sum(
    cv2.resize(RNG.uniform(0, 255, (size, size)), (400, 400), interpolation=cv2.INTER_CUBIC) / 3
    for size in (20, 50, 130)
)


def view(x=0.0, y=0.0, zoom=1.0):
    """Return what a camera at a place sees, uint8 [h w]."""
    matrix = np.array([[1 / zoom, 0, 200 + x - 80 / zoom], [0, 1 / zoom, 200 + y - 48 / zoom]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(TEXTURE, matrix, (WIDTH, HEIGHT), flags=flags)
    return np.clip(image, 0, 255).astype(np.uint8)


def cell(grey, **fields):
    """Return a cell of grey frames [t h w], the first two of them before it."""
    grey = np.asarray(grey, np.uint8)
    inside = grey[2:] if len(grey) > 2 else grey
    usual = {
        "start": 0.0,
        "end": len(inside) / FPS,
        "times": np.arange(len(inside)) / FPS,
        "grey": inside,
        "before": grey[:2] if len(grey) > 2 else grey[:0],
        "frame": np.repeat(inside[len(inside) // 2][..., None], 3, axis=-1),
        "anchor": None,
        "qp": None,
        "audio": None,
    }
    return Cell(**(usual | fields))


def measure(name, *args, **fields):
    return MEASURES[name].of(cell(*args, **fields))


def still(image):
    """Return a cell whose frames all are one image."""
    return np.repeat(np.asarray(image, np.uint8)[None], 4, axis=0)


@pytest.mark.parametrize("speed", [0.1, 0.5, 2.0, 6.0])  # pixels a frame
@pytest.mark.parametrize("direction", [(1.0, 0.0), (-0.6, 0.8)])
def test_the_speed_of_a_pan(speed, direction):
    frames = [view(direction[0] * speed * n, direction[1] * speed * n) for n in range(FRAMES)]
    assert measure("camera_speed", frames) == pytest.approx(speed * FPS / WIDTH, rel=0.15)
    assert measure("flow_strength", frames) == pytest.approx(speed * FPS / WIDTH, rel=0.25)


def test_repeated_frames_do_not_change_the_speed():
    frames = [view(2.0 * (n // 2)) for n in range(FRAMES)]
    assert measure("camera_speed", frames) == pytest.approx(FPS / WIDTH, rel=0.15)
    assert measure("shake", frames) < 1


def test_a_zoom_and_a_moving_object_are_no_camera_speed():
    assert measure("camera_speed", [view(zoom=1.01**n) for n in range(FRAMES)]) < 0.01
    frames = np.stack([view() for _ in range(FRAMES)])
    for number, frame in enumerate(frames):
        frame[30:60, 20 + 3 * number : 60 + 3 * number] = view(50, 50)[:30, :40]
    assert measure("camera_speed", frames) < 0.01
    assert measure("flow_strength", frames) > 0.02


def test_shake_is_jitter_and_no_pan_whip_pan_or_strobe():
    jitter = np.random.default_rng(1).normal(0, 1, (FRAMES, 2))
    assert measure("shake", [view(*place) for place in jitter]) > 10
    assert measure("shake", [view(2.0 * n) for n in range(FRAMES)]) < 1
    burst = np.cumsum([0.5] * 8 + [10] * 3 + [0.5])
    assert measure("shake", [view(x) for x in burst]) < 2
    assert measure("shake", [view(n) * (0.5 + 0.5 * (n % 2)) for n in range(FRAMES)]) < 4


def test_flicker_is_the_swing_of_the_levels():
    steady = [view(1.5 * n) / 2 + 50 for n in range(FRAMES)]
    assert measure("flicker", steady) < 1
    swing = [frame + (5 if n % 2 else -5) for n, frame in enumerate(steady)]
    # |Y- - 2 Y + Y+| / 2 of levels 5, -5, 5 is 10.
    assert measure("flicker", swing) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("width", [2, 4, 6])
def test_the_edge_width_of_a_ramp_is_its_width(width):
    # Ramps from 20 to 200 and back, `width` pixels long, 40 pixels apart.
    along = np.interp(
        np.arange(WIDTH) % 40, [0, 10, 10 + width, 30, 30 + width, 40], [20, 20, 200, 200, 20, 20]
    )
    image = np.tile(along, (HEIGHT, 1))
    assert measure("edge_width", still(image)) == pytest.approx(width, rel=0.02)


def test_enlarged_footage_has_wide_edges_and_no_fine_detail():
    noise = RNG.integers(0, 255, (192, 320)).astype(np.uint8)
    # White noise has the same energy at all frequencies.
    assert measure("fine_detail", still(noise)) == pytest.approx(0, abs=0.05)
    for kernel in (cv2.INTER_LINEAR, cv2.INTER_CUBIC):
        enlarged = cv2.resize(noise[:64, :106], (320, 192), interpolation=kernel)
        assert measure("fine_detail", still(enlarged)) < -0.5
        assert measure("edge_width", still(enlarged)) > 2.5  # it was 2.2


@pytest.mark.parametrize("times", [2, 3, 4])
def test_pixels_made_larger_repeat_lines(times):
    small = np.clip(TEXTURE[:100, :100], 0, 255).astype(np.uint8)
    larger = np.repeat(np.repeat(small, times, axis=0), times, axis=1)
    assert measure("repeated_lines", still(larger)) == pytest.approx(1 - 1 / times, abs=0.05)
    smooth = cv2.resize(small, larger.shape[::-1], interpolation=cv2.INTER_CUBIC)
    for image in (small, smooth):
        assert measure("repeated_lines", still(image)) < 0.1


def test_nothing_to_measure_is_none():
    flat = still(np.full((HEIGHT, WIDTH), 90))
    for name in ("edge_width", "fine_detail", "bar_share", "loudness", "quantiser", "text_share"):
        assert measure(name, flat) is None
    single = np.full((1, HEIGHT, WIDTH), 90)
    for name in ("camera_speed", "shake", "flow_strength", "flicker"):
        assert measure(name, single) is None


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 16), (2, 400)])
def test_tiny_images_are_measured_without_an_error(shape):
    frames = RNG.integers(0, 255, (6, *shape))
    for name in MEASURES:
        value = measure(name, frames)
        assert value is None or np.isfinite(value)


def test_blocks_of_an_earlier_encoding():
    clean = np.clip(TEXTURE[:192, :320], 0, 255).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", clean, [cv2.IMWRITE_JPEG_QUALITY, 8])[1]
    assert measure("blockiness", still(cv2.imdecode(jpeg, cv2.IMREAD_GRAYSCALE))) > 0.4
    assert measure("blockiness", still(clean)) < 0.1
    assert measure("blockiness", still(cv2.resize(clean[:64, :106], (320, 192)))) < 0.2
    assert measure("quantiser", still(clean), qp=np.array([30.0, 32.0])) == 31


@pytest.mark.parametrize("level", [0, 16, 128, 255])
def test_bars_are_found_to_the_pixel(level):
    image = np.random.default_rng(2).integers(0, 255, (HEIGHT, WIDTH))
    assert measure("bar_share", still(image)) == 0
    image[:13] = image[-9:] = level
    assert content_box(image.astype(np.uint8), still(image)) == (0, 13, 160, 74)
    image[:, :20] = image[:, -31:] = level
    assert content_box(image.astype(np.uint8), still(image)) == (20, 13, 109, 74)
    assert measure("bar_share", still(image)) == pytest.approx(1 - 109 * 74 / (HEIGHT * WIDTH))


def test_a_dark_sky_or_a_title_is_no_bar():
    sky = np.clip(np.linspace(0, 200, HEIGHT), 0, 255)[:, None] + np.zeros((1, WIDTH))
    assert measure("bar_share", still(sky)) in (0, None)
    title = np.zeros((HEIGHT, WIDTH))
    title[44:52] = RNG.integers(0, 255, (8, WIDTH))
    assert measure("bar_share", still(title)) == 0


def test_something_that_crosses_a_bar_makes_it_none():
    image = np.random.default_rng(2).integers(0, 255, (HEIGHT, WIDTH))
    image[:20] = 0
    frames = still(image)
    assert measure("bar_share", frames) == pytest.approx(20 / HEIGHT)
    later = frames.copy()
    later[-1, 4:16, 30:100] = 200
    assert (
        measure("bar_share", later, frame=np.repeat(image[..., None], 3, -1).astype(np.uint8)) == 0
    )


def test_loudness_of_a_tone():
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    frames = still(view())
    assert measure("loudness", frames, audio=tone) == pytest.approx(-9.03, abs=0.01)
    assert measure("loudness", frames, audio=np.zeros(100, np.float32)) == -100
    assert measure("loudness", frames, audio=np.zeros(0, np.float32)) is None


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """A second of video that begins 0.25 s after the audio; a tone from 0.5 s of it on."""
    path = tmp_path_factory.mktemp("measures") / "a.mkv"
    late = Fraction(1, 4)
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=FPS)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "bgr0"
        audio = out.add_stream("pcm_s16le", rate=48_000, layout="mono")
        times = np.arange(60_000) / 48_000 - float(late)
        wave = np.where(times >= 0.5, 16_384 * np.sin(2 * np.pi * 440 * times), 0)
        for start in range(0, len(wave), 1000):
            samples = wave[None, start : start + 1000].astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
            out.mux(audio.encode(frame))
        for number in range(FPS):
            pixels = np.repeat(view(number)[..., None], 3, axis=-1)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = number + int(late * FPS), Fraction(1, FPS)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        out.mux(audio.encode(None))
    return path


def test_audio_is_read_once_and_no_sample_is_lost(footage):
    edges = [0, 0.1, 0.3, 0.35, 0.95, 1.0]
    spans = list(audio_spans(str(footage), 0.25, itertools.pairwise(edges)))
    lengths = [round((last - first) * RATE) for first, last in itertools.pairwise(edges)]
    assert [len(span) for span in spans] == pytest.approx(lengths, abs=20)
    found = np.concatenate(spans)
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / RATE)
    assert np.abs(found[: int(0.49 * RATE)]).max() < 0.01
    inside = slice(int(0.52 * RATE), int(0.95 * RATE))
    assert np.abs(found[inside] - tone[inside]).max() < 0.05


def test_cells_of_a_file_have_its_loudness_and_speed(footage):
    cells = look(footage, LookSettings()).cells
    assert cells["loudness"][0] < -60
    assert cells["loudness"][1] == pytest.approx(-9.03, abs=0.2)
    assert cells["camera_speed"] == pytest.approx([FPS / WIDTH] * 2, rel=0.15)


def lines(*places):
    return [TextLine("SAMPLE", *place) for place in places]


CORNER = (0.7, 0.1, 0.9, 0.2)
CAPTION = (0.3, 0.8, 0.7, 0.9)


def test_a_watermark_is_text_that_stays_while_the_image_moves():
    frames = np.stack([view(2.0 * n) for n in range(FRAMES)])
    mark = view(90, 90)[:10, :32]
    frames[:, 10:20, 112:144] = mark
    moving = cell(frames)
    moving.__dict__["text"] = lines(CORNER, CAPTION)
    assert MEASURES["watermark_share"].of(moving) == pytest.approx(0.02)
    assert MEASURES["text_share"].of(moving) == pytest.approx(0.04)
    sign = cell([view(2.0 * n) for n in range(FRAMES)])
    sign.__dict__["text"] = lines(CORNER)
    assert MEASURES["watermark_share"].of(sign) == 0
    assert MEASURES["text_share"].of(sign) == pytest.approx(0.02)


def test_a_missing_reader_is_named(footage, monkeypatch):
    from vdx.data.curation import text_reader

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    text_reader._reader.cache_clear()
    with pytest.raises(ConfigError, match=r"vdx\[text\]"):
        look(footage, LookSettings(text=True))


def test_the_reader_reads():
    pytest.importorskip("rapidocr", reason="the extra `text` is not installed")
    frame = np.full((224, 400, 3), 90, np.uint8)
    assert cell(still(view()), frame=frame, reads_text=True).text == []
    cv2.putText(frame, "SAMPLE", (40, 60), cv2.FONT_HERSHEY_DUPLEX, 1.0, (255,) * 3, 2)
    (line,) = cell(still(view()), frame=frame, reads_text=True).text
    assert line.text == "SAMPLE"
    assert line[1:] == pytest.approx([0.1, 0.17, 0.4, 0.28], abs=0.04)
