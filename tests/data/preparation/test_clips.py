"""Clips: true frames, times, motion and audio, and the same bytes every time."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from vdx.data.motion import motion_score
from vdx.data.preparation.clips import ClipSettings, ClipSpan, clip_key, make_clips, read_clip
from vdx.data.preparation.store import Store
from vdx.data.video_files import video_record

RATE = 48_000
TIMES = np.array([0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13]) / 10  # uneven
END = 1.4
LATE = 0.25  # seconds that the video begins after the audio
TONE = 440  # hertz, from the first frame shown on


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write grey frames, each brighter, at uneven times; silence, then a tone from 0.5 s on."""
    path = tmp_path_factory.mktemp("clips") / "a.mkv"
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=Fraction(1000))
        video.width, video.height, video.pix_fmt = 64, 48, "bgr0"
        video.codec_context.time_base = Fraction(1, 1000)
        audio = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        instants = np.arange(int((LATE + END) * RATE)) / RATE - LATE
        wave = np.where(instants >= 0.5, 8000 * np.sin(2 * np.pi * TONE * instants), 0)
        for start in range(0, len(wave), 1024):
            chunk = wave[None, start : start + 1024].astype(np.int16)
            frame = av.AudioFrame.from_ndarray(chunk, "s16", "mono")
            frame.sample_rate, frame.pts = RATE, start
            frame.time_base = Fraction(1, RATE)
            out.mux(audio.encode(frame))
        for number, time in enumerate(TIMES):
            pixels = np.full((48, 64, 3), 20 * number, np.uint8)
            pixels[:8] = 255
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = round(1000 * (time + LATE)), Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        out.mux(audio.encode(None))
    return path


def make(source, root, *spans, **settings):
    store = Store(root, "clips", ".npz")
    settings = ClipSettings(**settings)
    spans = [ClipSpan(str(i), *span) for i, span in enumerate(spans)]
    make_clips(source, spans, settings, store)
    return [read_clip(store.path(span.key).read_bytes()) for span in spans]


def test_frames_and_times_are_those_of_the_source(source, tmp_path):
    first, second = make(source, tmp_path, (0.0, 0.6, None), (0.6, 1.4, [0, 8, 64, 40]))
    # The last frame of the first clip is shown three times as long as others, that of the source
    # for one tick.
    for clip, numbers, seconds in ((first, range(4), 0.6), (second, range(4, 12), 0.701)):
        record = video_record("a", "", lambda data=clip["video"].tobytes(): io.BytesIO(data))
        expected = TIMES[list(numbers)] - TIMES[numbers[0]]
        assert record.timestamps == pytest.approx(expected, abs=1e-4)
        assert clip["timestamps"] == pytest.approx(expected, abs=1e-6)
        assert record.duration == pytest.approx(seconds, abs=1e-3)
        frames = record.read(record.timestamps)
        levels = frames[:, 20:, :].mean((1, 2, 3))
        assert levels == pytest.approx([20 * n for n in numbers], abs=3)
    assert first["video"].size and frames.shape[1:] == (40, 64, 3)
    assert second["fps"] == pytest.approx(10, abs=0.01)


def test_motion_is_that_of_the_whole_clip(source, tmp_path):
    (clip,) = make(source, tmp_path, (0.6, 1.4, None))
    frames = np.stack([np.full((48, 64, 3), 20 * n, np.uint8) for n in range(4, 12)])
    frames[:, :8] = 255
    assert clip["motion"] == pytest.approx(motion_score(frames, 10), rel=0.01)


def test_audio_is_aligned_to_the_frames(source, tmp_path):
    (clip,) = make(source, tmp_path, (0.3, 1.0, None))
    samples = clip["audio"]
    assert samples.dtype == np.int16 and len(samples) == round(0.7 * 16_000)
    instants = 0.3 + np.arange(len(samples)) / 16_000
    away = np.abs(instants - 0.5) > 0.01  # the filter of the resampler

    def error(late):
        tone = 8000 * np.sin(2 * np.pi * TONE * (instants - late))
        return np.abs(samples - np.where(instants >= 0.5, tone, 0))[away].max()

    # Matroska rounds times to milliseconds.
    assert min(error(late / RATE) for late in range(-24, 25)) < 100
    assert error(0.001) > 1000


def test_the_same_bytes_every_time(source, tmp_path):
    for folder in ("a", "b"):
        make(source, tmp_path / folder, (0.0, 0.6, None), short_side=24)
    one, two = (path.read_bytes() for path in sorted(tmp_path.rglob("*.npz")))
    assert one == two


def test_large_clips_are_made_smaller(source, tmp_path):
    (clip,) = make(source, tmp_path, (0.0, 0.6, None), short_side=24, audio_rate=0)
    record = video_record("a", "", lambda: io.BytesIO(clip["video"].tobytes()))
    assert record.read(np.zeros(1)).shape == (1, 24, 32, 3)
    assert not clip["audio"].size


def test_the_key_is_that_of_the_span_not_of_the_caption():
    row = {"start": 0.0, "end": 1.0, "crop": None, "caption": "a"}
    key = clip_key("x", row, ClipSettings())
    assert key == clip_key("x", {**row, "caption": "b"}, ClipSettings())
    assert key != clip_key("y", row, ClipSettings())
    assert key != clip_key("x", {**row, "end": 1.5}, ClipSettings())
    assert key != clip_key("x", row, ClipSettings(crf=20))


def test_a_span_without_frames_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="no frame"):
        make(source, tmp_path, (5.0, 6.0, None))
