"""The instants that a clip takes, and its frames after resizing."""

from fractions import Fraction

import numpy as np
import pytest

from vdx.config.build import fill
from vdx.data.record import BadRecord, Record, clip_times, frame_index_at, frame_step
from vdx.data.resize import resize
from vdx.data.transforms import ClipSampling, to_example

RNG = np.random.default_rng


def footage(frames=24, fps=12.0, timestamps=None):
    """Return a record whose frame number is its grey level."""
    stamps = np.arange(frames) / fps if timestamps is None else np.asarray(timestamps, float)

    def read(times):
        shown = np.searchsorted(stamps, times + 1e-3, side="right") - 1
        return np.broadcast_to(shown[:, None, None, None], (len(times), 8, 8, 3)).astype(np.uint8)

    return Record("clip", "a red ball", stamps[-1] + 1 / fps, stamps, read)


def procedural(duration=2.0):
    return Record(
        "scene", "a ball", duration, None, lambda t: np.zeros((len(t), 8, 8, 3), np.uint8)
    )


def shown(clip, record, num_frames, seed=0):
    times, fps = clip.times(record, num_frames, RNG(seed))
    return record.read(times)[:, 0, 0, 0].tolist(), fps


@pytest.mark.parametrize("start, first", [("first", 0), ("centre", 4)])
def test_a_clip_at_a_lower_rate_takes_every_second_frame(start, first):
    clip = ClipSampling(8, fps=6.0, start=start)
    frames, fps = shown(clip, footage(), 8)
    assert fps == 6 and frames == list(range(first, first + 16, 2))


def test_random_starts_are_on_frames_and_reach_both_ends():
    clip = ClipSampling(8, fps=12.0)
    starts = set()
    for seed in range(200):
        frames, _ = shown(clip, footage(), 8, seed)
        assert np.diff(frames).tolist() == [1] * 7  # no frame twice, none left out
        starts.add(frames[0])
    assert starts == set(range(17))


def test_only_rates_that_the_footage_fills_are_drawn():
    clip = ClipSampling((8, 16), fps=(8.0, 4.0))
    drawn = lambda n: {clip.times(procedural(2.0), n, RNG(seed))[1] for seed in range(40)}
    assert drawn(8) == {4.0, 8.0} and drawn(16) == {8.0}
    with pytest.raises(BadRecord, match="too short"):  # none does
        clip.times(procedural(1.0), 16, RNG(0))


def test_rounded_timestamps_make_no_judder():
    record = footage(timestamps=np.round(np.arange(48) / 24, 3), fps=24)
    for seed in range(50):
        clip = ClipSampling(16, fps=24.0)
        frames, _ = shown(clip, record, 16, seed)
        assert np.diff(frames).tolist() == [1] * 15
        assert clip.times(record, 16, RNG(seed))[0][0] in record.timestamps


def test_variable_frame_rate_is_sampled_by_time():
    record = footage(timestamps=[0.0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5], fps=10)
    frames, fps = shown(ClipSampling(8, fps=5.0, start="first"), record, 8)
    assert frames == [0, 2, 3, 3, 3, 4, 6, 8] and fps == 5


def test_each_clip_draws_a_rate_that_the_footage_has():
    clip = ClipSampling((8,), fps=(4.0, 8.0, 12.0, 24.0))
    assert {clip.times(footage(), 8, RNG(s))[1] for s in range(40)} == {4, 8, 12}
    with pytest.raises(BadRecord, match="too slow: needs 24 frames per second, has 12"):
        ClipSampling(8, fps=24.0).times(footage(), 8, RNG(0))
    assert ClipSampling(8, fps=24.0).times(footage(fps=24000 / 1001), 8, RNG(0))[1] == 24


def test_a_stride_reports_the_rate_that_comes_of_it():
    clip = ClipSampling(5, stride=3, start="first")
    assert shown(clip, footage(fps=30.0), 5) == ([0, 3, 6, 9, 12], pytest.approx(10.0))
    uneven = footage(timestamps=[0, 0.1, 0.3, 0.6, 1.0], fps=10)
    times, fps = ClipSampling(3, stride=2, start="first").times(uneven, 3, RNG(0))
    assert times.tolist() == [0, 0.3, 1.0] and fps == pytest.approx(2.0)
    starts = {shown(ClipSampling(5, stride=3), footage(), 5, s)[0][0] for s in range(100)}
    assert starts == set(range(12))
    assert shown(ClipSampling(1, stride=2, start="first"), footage(), 1) == (
        [0],
        pytest.approx(6.0),
    )
    with pytest.raises(ValueError, match="set fps"):
        clip.times(procedural(), 5, RNG(0))


def test_procedural_clips_start_anywhere_and_stay_inside():
    clip = ClipSampling(8, fps=8.0)
    times = np.array([clip.times(procedural(), 8, RNG(s))[0] for s in range(100)])
    assert times.min() >= 0 and times.max() < 2.0 and times[:, 0].max() > 0.9
    np.testing.assert_allclose(np.diff(times), 1 / 8)


def test_a_short_record_is_refused_or_repeated():
    record = footage(frames=6)
    with pytest.raises(BadRecord, match=r"too short: needs 1 s, has 0\.5 s"):
        ClipSampling(12, fps=12.0).times(record, 12, RNG(0))
    with pytest.raises(BadRecord, match="too short: needs 13 frames, has 6"):
        ClipSampling(7, stride=2).times(record, 7, RNG(0))
    assert shown(ClipSampling(6, fps=12.0), record, 6)[0] == [0, 1, 2, 3, 4, 5]  # just enough
    assert shown(ClipSampling(9, fps=12.0, short="hold"), record, 9)[0] == [
        0,
        1,
        2,
        3,
        4,
        5,
        5,
        5,
        5,
    ]
    assert shown(ClipSampling(9, fps=12.0, short="loop"), record, 9)[0] == [
        0,
        1,
        2,
        3,
        4,
        5,
        0,
        1,
        2,
    ]
    assert shown(ClipSampling(5, stride=2, short="hold"), record, 5) == (
        [0, 2, 4, 5, 5],
        pytest.approx(6),
    )
    assert shown(ClipSampling(5, stride=2, short="loop"), record, 5)[0] == [0, 2, 4, 0, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"fps": 8.0, "stride": 2},
        {"fps": 0.0},
        {"fps": ()},
        {"stride": 0},
        {"fps": 8.0, "start": "middle"},
        {"fps": 8.0, "short": "pad"},
        {"fps": 8.0, "num_frames": 0},
    ],
)
def test_a_sampling_that_is_not_valid_is_refused(fields):
    with pytest.raises(ValueError):
        ClipSampling(**{"num_frames": 8, **fields})


def test_sampling_is_built_from_a_config():
    clip = fill(ClipSampling, {"num_frames": [8, 16], "fps": 8}, "clip")
    assert clip.lengths == (8, 16) and clip.rates == (8.0,)
    assert fill(ClipSampling, {"num_frames": 8, "stride": 1}, "clip").lengths == (8,)


def test_resize_keeps_the_centre_and_the_shape():
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 20:60] = (200, 100, 50)  # the central square
    small = resize(frames, 10, 10)
    assert small.shape == (2, 10, 10, 3) and small.dtype == np.uint8
    np.testing.assert_allclose(
        small[:, 2:8, 2:8].astype(int), np.broadcast_to([200, 100, 50], (2, 6, 6, 3)), atol=1
    )
    assert resize(frames, 40, 80) is frames
    assert resize(frames.swapaxes(1, 2), 12, 20).shape == (2, 12, 20, 3)
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # finer than the small picture: must average, not alias
    assert np.abs(resize(stripes, 16, 16).astype(int) - 127).max() < 12


def test_an_example_has_the_fields_of_a_batch():
    def tokenize(caption):
        return np.array([len(caption), 7], np.int32), np.array([1, 0])

    made = to_example(
        footage(),
        clip=ClipSampling(8, fps=6.0),
        height=4,
        width=6,
        tokenize=tokenize,
        num_frames=8,
        rng=RNG(0),
    )
    kinds = {k: (v.dtype, v.shape) for k, v in made.items() if k != "key"}
    assert kinds == {
        "video": (np.uint8, (8, 4, 6, 3)),
        "text": (np.int32, (2,)),
        "text_mask": (bool, (2,)),
        "fps": (np.float32, ()),
        "num_frames": (np.int32, ()),
    }
    assert made["key"] == "clip" and made["text"][0] == len("a red ball")


def test_frames_of_another_kind_are_a_bad_record():
    wrong = Record("grey", "", 2.0, None, lambda t: np.zeros((len(t), 8, 8), np.uint8))
    with pytest.raises(BadRecord, match="grey: gave frames uint8"):
        to_example(
            wrong,
            clip=ClipSampling(8, fps=8.0),
            height=8,
            width=8,
            tokenize=lambda c: ([0], [True]),
            num_frames=8,
            rng=RNG(0),
        )


NAMED = (12, 15, 24, 25, 30, 48, 50, 60, 120)  # rates by name; some of them are NTSC's too
ROUNDED = (None, 1e-3, 1 / 600, 1 / 90000)  # seconds; ticks of containers, None: exact


def rated(rate, tick=None, frames=400):
    """Return footage at a rate, its timestamps rounded as a container does."""
    stamps = np.arange(frames) / rate
    if tick is not None:
        stamps = np.round(stamps / tick) * tick
    return footage(timestamps=stamps, fps=rate)


@pytest.mark.parametrize("tick", ROUNDED)
@pytest.mark.parametrize("fps", NAMED)
def test_near_integer_rates_give_the_frames_of_the_rates_that_name_them(fps, tick):
    """Either of two rates may be 1000/1001 of its name: frames come at the ratio of the names."""
    for named in NAMED:
        step = Fraction(named, fps)
        if step < 1 or step.denominator > 8:
            continue
        want = [i * step.numerator // step.denominator for i in range(int(390 / step))]
        for rate, asked in (
            (named / 1.001, fps),
            (named, fps / 1.001),
            (named, fps),
            (named * 1.001, fps),
        ):
            record = rated(rate, tick)
            clip = ClipSampling(len(want), fps=float(asked), start="first")
            times, told = clip.times(record, len(want), RNG(0))
            found = frame_index_at(record.timestamps, times)
            assert found.tolist() == want and told == asked, (rate, asked)
            assert clip_times(record, asked, len(want)).tolist() == times.tolist()


@pytest.mark.parametrize("rate", [24000 / 1001, 24024 / 1000])
def test_a_near_rate_fills_exactly_the_clips_that_it_has_frames_for(rate):
    clip = ClipSampling((81, 82), fps=24.0)
    record = rated(rate, frames=81)
    assert clip.frames_available(record) == 81
    assert shown(clip, record, 81, 7)[0] == list(range(81))
    with pytest.raises(BadRecord, match=r"too short: needs 3\.42 s, has 3\.38 s"):
        clip.times(record, 82, RNG(0))
    for short, last in (("hold", 80), ("loop", 0)):
        frames, _ = shown(ClipSampling(82, fps=24.0, short=short), record, 82)
        assert frames == [*range(81), last]


def test_other_ratios_and_uneven_footage_keep_their_times():
    assert frame_step(rated(25.0).timestamps, 24.0) is None  # another rate, not another name
    assert frame_step(rated(24.06).timestamps, 24.0) is None  # 0.25 % off
    assert frame_step(rated(24.04).timestamps, 24.0) == 1
    assert frame_step(np.array([0.0]), 24.0) is None
    even = rated(24000 / 1001).timestamps
    assert frame_step(even, 24.0) == 1
    for missing in (1, 200, 398):  # one frame left out anywhere is uneven
        assert frame_step(np.delete(even, missing), 24.0) is None
    jitter = RNG(0).uniform(-0.1, 0.1, even.shape) / 24
    assert frame_step(even + jitter, 24.0) == 1
    times = ClipSampling(50, fps=24.0, start="first").times(
        footage(timestamps=np.delete(even, 200), fps=24), 50, RNG(0)
    )[0]
    np.testing.assert_allclose(times, np.arange(50) / 24)
    record = procedural()  # any instant may be read
    np.testing.assert_array_equal(clip_times(record, 8.0, 4), np.arange(4) / 8)
