"""The reader is right on true renders, and wrong readings follow from planted faults."""

import numpy as np
import pytest

from vdx.data.scenes.source import Scenes
from vdx.data.scenes.world import COLOURS, MOTIONS, SHAPES, Object, Scene
from vdx.metrics.prompt_following import ATTRIBUTES, read_attributes, score

TIMES = np.arange(16) / 8.0
FULL = Scenes(max_objects=1, cameras=("static",), split="all", seed=11)
SIMPLE = Scenes(
    max_objects=1,
    cameras=("static",),
    split="all",
    seed=12,
    styles=("flat",),
    backgrounds=("black", "grey"),
    shapes=("circle", "square", "triangle", "cross"),
    colours=("red", "green", "blue", "yellow", "purple", "cyan"),
)


def clips(source, count, frames=16, fps=8.0, size=32):
    scenes = [source.scene(i) for i in range(count)]
    times = np.arange(frames) / fps
    return ([s.render(times, size, size) for s in scenes], [s.attributes for s in scenes])


def soften(video, amount=0.25):
    """Blur by [amount, 1 - 2 amount, amount] along both axes of the frame."""
    for axis in (1, 2):
        near = np.roll(video, 1, axis) + np.roll(video, -1, axis)
        video = amount * near + (1 - 2 * amount) * video
    return video


def spoil(video, rng, noise, blur=True, gain=0.95, tint=(8.0, 0.0, 4.0)):
    video = soften(video.astype(np.float64)) if blur else video.astype(np.float64)
    video = video * gain + np.array(tint) + rng.normal(0.0, noise, video.shape)
    return np.clip(np.rint(video), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def truth():
    videos, wanted = clips(FULL, 100)
    return videos, wanted, score(videos, wanted)


def test_true_renders_are_read(truth):
    result = truth[2]
    assert result["count"] == 100
    assert result["accuracy"]["all"] >= 0.99, result["confusion"]


def test_the_simple_subset_is_read():
    result = score(*clips(SIMPLE, 40))
    assert result["accuracy"]["all"] == 1.0, result["confusion"]


@pytest.mark.slow
@pytest.mark.parametrize("frames, fps, size", [(8, 8.0, 32), (16, 16.0, 32), (12, 8.0, 64)])
def test_other_lengths_rates_and_sizes_are_read(frames, fps, size):
    result = score(*clips(FULL, 40, frames, fps, size), fps=fps)
    assert result["accuracy"]["all"] >= 0.98, result["confusion"]


@pytest.mark.parametrize("noise", [pytest.param(8.0, marks=pytest.mark.slow), 16.0])
def test_imperfect_clips_are_read(noise):
    videos, wanted = clips(FULL, 40)
    rng = np.random.default_rng(0)
    result = score([spoil(v, rng, noise) for v in videos], wanted)
    assert result["accuracy"]["all"] >= 0.95, result["confusion"]


def test_chance_is_what_shuffled_prompts_get(truth):
    videos, wanted, result = truth
    rng = np.random.default_rng(0)
    for name in (*ATTRIBUTES, "all"):
        keys = ATTRIBUTES if name == "all" else (name,)
        read = [tuple(r[k] for k in keys) for r in result["readings"]]
        right = [tuple(a[k] for k in keys) for a in wanted]
        shuffled = [
            np.mean([read[i] == right[j] for i, j in enumerate(rng.permutation(len(videos)))])
            for _ in range(200)
        ]
        assert result["chance"][name] == pytest.approx(np.mean(shuffled), abs=0.01)
    assert result["chance"]["colour"] == pytest.approx(1 / len(COLOURS), abs=0.02)
    assert result["chance"]["shape"] == pytest.approx(1 / len(SHAPES), abs=0.02)
    assert result["chance"]["motion"] == pytest.approx(1 / len(MOTIONS), abs=0.02)


def test_confusion_counts_what_was_read():
    videos, wanted = clips(SIMPLE, 3)
    blank = np.zeros_like(videos[0])
    result = score([*videos, blank], [*wanted, wanted[0]])
    for name in ATTRIBUTES:
        labels, matrix = result["confusion"][name]["labels"], result["confusion"][name]["matrix"]
        assert labels[-1] == "none" and np.sum(matrix) == 4
        assert matrix[labels.index(wanted[0][name])][-1] == 1
    assert result["accuracy"]["all"] == 0.75


def planted(shape="square", colour="red", motion="right", style="flat", back="grey", **numbers):
    where = {
        "right": {"x": 0.3},
        "up": {"y": 0.7},
        "bounce": {"y": 0.85, "rise": 0.4},
        "shrink": {"radius": 0.27},
    }.get(motion, {})
    item = Object(
        shape, colour, motion, "large", "slow", **{"radius": 0.18, "phase": 0.6, **where, **numbers}
    )
    return Scene((item,), back, "static", style)


def test_recolouring_changes_the_colour_only():
    for colour in COLOURS:
        video = planted(colour="red").render(TIMES, 32, 32)
        other = planted(colour=colour).render(TIMES, 32, 32)
        assert read_attributes(video)["colour"] == "red"
        assert read_attributes(other) == {"colour": colour, "shape": "square", "motion": "right"}


def test_another_shape_changes_the_shape_only():
    for shape in SHAPES:
        video = planted(shape=shape, motion="up", back="dots").render(TIMES, 32, 32)
        assert read_attributes(video) == {"colour": "red", "shape": shape, "motion": "up"}


@pytest.mark.parametrize(
    "motion, reversed_reads",
    [
        ("right", "left"),
        ("left", "right"),
        ("up", "down"),
        ("down", "up"),
        ("grow", "shrink"),
        ("shrink", "grow"),
        ("turn", "none"),
        ("bounce", "bounce"),
    ],
)
def test_time_reversed_and_frozen_clips(motion, reversed_reads):
    video = planted(motion=motion).render(TIMES, 32, 32)
    right = {"colour": "red", "shape": "square"}
    assert read_attributes(video) == {**right, "motion": motion}
    assert read_attributes(video[::-1]) == {**right, "motion": reversed_reads}
    assert read_attributes(np.repeat(video[8:9], 16, 0)) == {**right, "motion": "none"}


def test_frames_in_random_order_do_not_move_right():
    video = planted().render(TIMES, 32, 32)
    order = np.random.default_rng(1).permutation(16)
    assert read_attributes(video[order])["motion"] != "right"


def test_the_frame_rate_decides_what_counts_as_moving():
    """The same frames at a sixth of the rate are too slow to be a scene's motion."""
    video = planted(motion="right").render(TIMES, 32, 32)
    assert read_attributes(video, fps=8.0)["motion"] == "right"
    assert read_attributes(video, fps=1.3)["motion"] == "none"


def test_nothing_is_read_where_nothing_is():
    nothing = dict.fromkeys(ATTRIBUTES, "none")
    rng = np.random.default_rng(0)
    blank = Scene((), "checks").render(TIMES, 32, 32)
    noise = rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
    assert read_attributes(blank) == nothing
    assert read_attributes(spoil(blank, rng, 16.0)) == nothing
    assert read_attributes(noise)["motion"] == "none"
    assert read_attributes(noise)["shape"] == "none"
    # An object that is there in only a few frames has a colour, and no motion.
    video = planted(back="checks").render(TIMES, 32, 32)
    video[3:] = blank[3:]
    assert read_attributes(video)["motion"] == "none"


@pytest.mark.parametrize("high, wide", [(4, 14), (5, 10), (18, 3)])
def test_a_shape_that_no_scene_has_is_none(high, wide):
    video = np.zeros((16, 32, 32, 3), np.uint8)
    for i, frame in enumerate(video):
        frame[8 : 8 + high, 3 + i // 2 : 3 + i // 2 + wide] = COLOURS["red"]
    assert read_attributes(video) == {"colour": "red", "shape": "none", "motion": "right"}


def test_the_vocabulary_can_be_restricted():
    video = planted(colour="orange").render(TIMES, 32, 32)
    assert read_attributes(video, colours=("blue", "green"))["colour"] == "none"
    assert read_attributes(video, motions=("left", "up"))["motion"] == "none"


def test_errors_say_what_was_given():
    with pytest.raises(ValueError, match=r"is float64 \[2, 3\], expected uint8"):
        read_attributes(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="1 clips and 2 prompts"):
        score([np.zeros((8, 32, 32, 3), np.uint8)], [{}, {}])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])
