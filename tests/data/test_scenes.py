"""Scenes are a pure function of (seed, split, index), and their state is what is drawn."""

import dataclasses
import itertools
import pickle
import time

import numpy as np
import pytest

from vdx.config.build import ConfigError, build
from vdx.data.scenes.captions import (
    BACKGROUND_WORDS,
    CAMERA_WORDS,
    MOTION_WORDS,
    SIZE_WORDS,
    SPEED_WORDS,
    STYLE_WORDS,
    describe,
)
from vdx.data.scenes.sampling import is_validation
from vdx.data.scenes.source import Scenes
from vdx.data.scenes.world import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    COMMAND_SPEED,
    COMMANDED,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    STAY,
    STYLES,
    Object,
    Scene,
)

TIMES = np.arange(16) / 8.0
ONE = Scenes(max_objects=1, cameras=("static",), split="all")


def centroid(video):
    """Return [t 2] in unit-square coordinates, of a white object on black."""
    mass = video[..., 0].astype(np.float64)
    height, width = mass.shape[1:]
    x = (mass.sum(1) * (np.arange(width) + 0.5) / width).sum(-1)
    y = (mass.sum(2) * (np.arange(height) + 0.5) / height).sum(-1)
    return np.stack([x, y], -1) / mass.sum((1, 2))[:, None]


def alone(shape, motion, style="flat", camera="static", **numbers):
    item = Object(shape, "white", motion, "large", "slow", **{"radius": 0.18, **numbers})
    return Scene((item,), "black", camera, style)


def test_same_index_same_bytes_other_index_other_clip():
    one, two = Scenes(seed=3), Scenes(seed=3)
    assert one.scene(17) == two.scene(17)
    np.testing.assert_array_equal(one[17].read(TIMES), two[17].read(TIMES))
    assert one.scene(17) != one.scene(18)
    assert one.scene(17) != Scenes(seed=4).scene(17)
    assert one.scene(17) != Scenes(seed=3, split="all").scene(17)
    assert len({one.scene(i) for i in range(500)}) == 500


def test_known_clip_does_not_change():
    """A changed generator would silently change every validation prompt and reported number."""
    scene = Scenes(seed=0, split="validation").scene(0)
    assert scene.caption == (
        "a cyan square floating upwards and a purple ring gently "
        "getting bigger on a checkered background, soft edges"
    )
    assert (scene.objects[0].x, scene.objects[1].y) == pytest.approx((0.8674534, 0.6649842))


def test_record_reads_any_instant_and_travels_to_a_worker():
    record = Scenes(height=24, width=40)[5]
    video = pickle.loads(pickle.dumps(record)).read(np.array([0.0, 0.3, 1.7]))
    assert video.shape == (3, 24, 40, 3) and video.dtype == np.uint8
    assert record.key == "scenes/train/0/5" and record.timestamps is None
    assert record.duration == STAY and record.caption == Scenes().scene(5).caption
    assert record.attributes == Scenes().scene(5).attributes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", MOTIONS)
def test_state_is_where_the_pixels_are(shape, motion):
    """Every shape is drawn about its centroid, so the state's centre can be measured."""
    where = {"left": (0.7, 0.5), "right": (0.3, 0.5), "up": (0.5, 0.7), "down": (0.5, 0.3)}
    x, y = where.get(motion, (0.47, 0.53))
    scene = alone(shape, motion, x=x, y=0.75 if motion == "bounce" else y, rise=0.4, phase=0.6)
    times = TIMES[:12]
    error = centroid(scene.render(times, 32, 32)) - scene.state(times)[0]["center"]
    # Antialiasing favours no side of a shape that is the same upside down.
    assert np.abs(error * 32).max() < (
        0.05 if shape in ("circle", "ring", "square", "cross") else 0.07
    )


@pytest.mark.parametrize("style", STYLES)
def test_radius_is_what_is_drawn(style):
    scene = alone("circle", "grow", style, radius=0.15)
    video, state = scene.render(TIMES[:8], 64, 64), scene.state(TIMES[:8])[0]
    area = (video[..., 0] > 123).sum((1, 2)) / 64**2
    np.testing.assert_allclose(np.sqrt(area / np.pi), state["size"], rtol=0.02)


def test_turning_is_clockwise_and_exact():
    """A triangle that has turned by a third of a circle looks as it did."""
    scene = alone("triangle", "turn")
    rate = scene.state(np.array([1.0]))[0]["angle"][0]
    assert rate > 0
    third = np.array([0.0, 2 * np.pi / 3 / rate])
    first, second = scene.render(third, 48, 48).astype(int)
    assert np.abs(first - second).max() <= 1
    quarter = scene.render(np.array([np.pi / 2 / rate]), 48, 48)[0, ..., 0]
    columns = quarter.sum(0).nonzero()[0] + 0.5  # the tip, at 1.12 radii, now points right
    assert columns.max() - 24 > 24 - columns.min() + 3


@pytest.mark.parametrize("motion", ["left", "right", "up", "down"])
def test_displacement_per_frame_follows_the_frame_rate(motion):
    scene = alone("circle", motion, x=0.5, y=0.5)
    slow, fast = np.arange(5) / 4.0, np.arange(17) / 16.0
    steps = [np.diff(scene.state(t)[0]["center"], axis=0) for t in (slow, fast)]
    np.testing.assert_allclose(steps[0][0], 4 * steps[1][0], atol=1e-12)
    assert np.abs(steps[1]).max() == pytest.approx(SPEEDS["slow"] / 16)
    np.testing.assert_array_equal(scene.render(slow, 32, 32), scene.render(fast, 32, 32)[::4])


def test_centre_does_not_depend_on_the_resolution():
    scene = alone("square", "right", x=0.3, y=0.45)
    small, large = (centroid(scene.render(TIMES, n, n)) for n in (32, 64))
    np.testing.assert_allclose(small, large, atol=0.05 / 32)


def test_shapes_keep_their_aspect_in_wide_frames():
    frame = alone("circle", "grow", x=0.5, y=0.5).render(np.zeros(1), 32, 64)[0, ..., 0] > 123
    assert frame.any(0).sum() == frame.any(1).sum()


def test_a_pan_moves_object_and_background_together():
    scene = dataclasses.replace(
        alone("circle", "grow", camera="pan left", x=0.3), background="stripes"
    )
    assert np.diff(scene.state(TIMES)[0]["center"][:, 0]).min() > 0
    later = 0.25 / CAMERAS["pan left"]  # one period of the stripes
    first, last = scene.render(np.array([0.0, later]), 32, 32)
    np.testing.assert_array_equal(first[0], last[0])
    moved = scene.render(np.array([later / 2]), 32, 32)[0]
    assert np.abs(first[0].astype(int) - moved[0]).max() > 20


@pytest.mark.parametrize("split", ["train", "validation"])
def test_objects_stay_in_the_frame(split):
    source, edge = Scenes(split=split), 1e-9
    for i in range(1000):
        scene = source.scene(i)
        for item, state in zip(scene.objects, scene.state(np.linspace(0, STAY, 9)), strict=True):
            reach = state["size"][:, None] * (0.55 if item.motion == "bounce" else 1.0)
            assert (state["center"] - reach > -edge).all(), (item, scene.camera)
            assert (state["center"] + reach < 1 + edge).all(), (item, scene.camera)


def test_a_bounce_turns_round_within_a_second_and_a_half():
    source = Scenes(motions=("bounce",), split="all", max_objects=1)
    for i in range(200):
        y = source.scene(i).state(np.linspace(0, 1.5, 61))[0]["center"][:, 1]
        steps = np.diff(y)
        assert steps.max() > 0.01 and steps.min() < -0.01


COMMANDABLE = Scenes(motions=(COMMANDED,), split="all", max_objects=1)


def test_a_commanded_object_obeys_its_actions_and_stays_in_the_frame():
    """From a start on the grid of 1/8 s every frame's displacement is that of its action."""
    times, ways = np.arange(16) / 8, np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
    often = np.zeros(5)
    for i in range(300):
        scene = COMMANDABLE.scene(i)
        item, state = scene.objects[0], scene.state(times)[0]
        assert "steered" in scene.caption or "driven" in scene.caption
        rows = item.actions(times)
        assert rows.dtype == np.int32 and rows[-1] == rows[-2]
        moved = np.diff(state["center"], axis=0)
        moved[:, 0] -= CAMERAS[scene.camera] / 8
        np.testing.assert_allclose(
            moved, COMMAND_SPEED * SPEEDS[item.speed] / 8 * ways[rows[:-1]], atol=1e-12
        )
        reach = state["size"][:, None]
        assert (state["center"] - reach > 0).all() and (state["center"] + reach < 1).all()
        changes = np.diff([begin for begin, _ in item.commands])
        assert set(changes) <= {0.25, 0.5} and item.commands[-1][1] == "stay"
        often += np.bincount(rows, minlength=5)
    assert (often / often.sum() > 0.12).all()


def test_commanded_is_not_among_the_default_motions():
    assert COMMANDED not in MOTIONS and COMMANDED not in Scenes().motions
    long = dataclasses.replace(COMMANDABLE, duration=5.0).scene(3).objects[0]
    assert long.commands[-1][0] >= 5.0


@pytest.mark.parametrize(
    "motion, rows",
    [("left", [1] * 4), ("down", [4] * 4), ("turn", [0] * 4), ("bounce", [3, 3, 4, 4])],
)
def test_an_object_without_commands_has_a_direction(motion, rows):
    item = Object("star", "red", motion, "large", "slow", rise=0.4)
    assert item.actions(np.array([0.1, 0.3, 0.5, 1.1]) * 1.2).tolist() == rows
    assert item.actions(np.array([0.2, 0.2])).tolist() == [0, 0]  # a clip that repeats a frame


def test_two_objects_have_two_colours_and_room():
    scenes = [Scenes(seed=1).scene(i) for i in range(1000)]
    pairs = [s for s in scenes if len(s.objects) == 2]
    assert 400 < len(pairs) < 600
    assert all(len({o.colour for o in s.objects}) == 2 for s in pairs)
    gaps = []
    for scene in pairs:
        one, two = scene.state(np.zeros(1))
        apart = np.linalg.norm(one["center"] - two["center"])
        gaps.append(apart / (one["size"] + two["size"])[0])
    assert np.mean(np.array(gaps) < 0.7) < 0.02


def test_validation_combinations_never_train_and_every_word_does():
    drawn = {"train": set(), "validation": set()}
    for split, triples in drawn.items():
        source = Scenes(split=split)
        for i in range(3000):
            for item in source.scene(i).objects:
                triples.add((item.colour, item.shape, item.motion))
    assert not drawn["train"] & drawn["validation"]
    assert all(
        is_validation(*t) == (split == "validation") for split in drawn for t in drawn[split]
    )
    words = [{t[k] for t in drawn["train"]} for k in range(3)]
    assert words == [set(COLOURS), set(SHAPES), set(MOTIONS)]
    everything = drawn["train"] | drawn["validation"]
    assert 0.15 < len(drawn["validation"]) / len(everything) < 0.25
    for a, b in itertools.combinations(range(3), 2):
        pairs = {(t[a], t[b]) for t in everything}
        assert pairs == {(t[a], t[b]) for t in drawn["train"]}
    assert all(s not in ("circle", "ring") for _, s, m in everything if m == "turn")


def test_captions_are_true_and_within_the_limit():
    for split, i in itertools.product(("train", "validation"), range(2500)):
        scene = Scenes(split=split).scene(i)
        caption = scene.caption
        assert caption.isascii() and len(caption) <= 64 * len(scene.objects), caption
        for item in scene.objects:
            assert f"{item.colour} {item.shape}" in caption
            assert any(w in caption for words in MOTION_WORDS[item.motion] for w in words)
        check_optional_words(scene, caption)


def check_optional_words(scene, caption):
    """Check that a size, speed, background, camera or style of a caption is the right one."""
    words_of_caption = set(caption.replace(",", "").split())
    for field, table in (("size", SIZE_WORDS), ("speed", SPEED_WORDS)):
        allowed = {w for o in scene.objects for w in table[getattr(o, field)]}
        assert words_of_caption & {w for words in table.values() for w in words} <= allowed, caption
    for field, table in (
        ("background", BACKGROUND_WORDS),
        ("camera", CAMERA_WORDS),
        ("style", STYLE_WORDS),
    ):
        for name, phrases in table.items():
            if name != getattr(scene, field) and "outlined" not in phrases:
                assert not any(caption.endswith(p) for p in phrases), (caption, scene)


def test_captions_vary_and_include_the_plain_one():
    scene = alone("circle", "right")
    captions = {describe(scene, np.random.default_rng(i)) for i in range(3000)}
    assert "a white circle moves right" in captions
    assert len(captions) > 500
    orange = dataclasses.replace(scene.objects[0], colour="orange")
    assert all(
        " a orange" not in f" {describe(Scene((orange,)), np.random.default_rng(i))}"
        for i in range(200)
    )


def test_every_word_has_its_phrases():
    assert set(MOTION_WORDS) == {*MOTIONS, COMMANDED} and set(BACKGROUND_WORDS) == set(BACKGROUNDS)
    assert set(CAMERA_WORDS) == set(CAMERAS) and set(STYLE_WORDS) == set(STYLES)
    assert set(SIZE_WORDS) == set(SIZES) and set(SPEED_WORDS) == set(SPEEDS)


def test_every_word_is_visible():
    """No two backgrounds, styles or shapes look the same."""
    scenes = [
        dataclasses.replace(alone(s, "grow", style), background=b)
        for s, style, b in itertools.product(SHAPES, STYLES, BACKGROUNDS)
    ]
    frames = np.stack([s.render(np.zeros(1), 32, 32)[0] for s in scenes]).astype(int)
    for a, b in itertools.combinations(range(len(frames)), 2):
        assert np.abs(frames[a] - frames[b]).max() > 8, (scenes[a], scenes[b])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shapes": ("circle", "hexagon")}, "hexagon.*Known: circle, square"),
        ({"colours": ("gren",)}, "Did you mean 'green'"),
        ({"motions": ()}, r"config\.data\.source\.motions is empty.*left"),
        ({"split": "test"}, "Known: train, validation, all"),
        ({"max_objects": 3}, r"data\.source\.max_objects: unknown name 3\. Known: 1, 2\."),
        ({"colours": ("red",)}, "two colours"),
        ({"shapes": ("ring",), "motions": ("turn",)}, "no 'train' combination"),
        ({"backgrounds": ("black",), "cameras": ("pan left",)}, "patterned background"),
        ({"height": 0}, r"data\.source\.height = 0 is out of range, expected int >= 1"),
        ({"size": "many"}, "size"),
        ({"colour": ("red",)}, "Did you mean 'colours'"),
    ],
)
def test_a_bad_config_is_an_error_that_lists_the_known_words(fields, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build({"name": "scenes", **fields}, {"scenes": Scenes}, "data.source")


def test_a_config_chooses_a_simple_subset():
    source = build(
        {
            "name": "scenes",
            "shapes": ["circle"],
            "colours": ["red"],
            "motions": ["left", "right"],
            "backgrounds": ["black"],
            "cameras": ["static"],
            "styles": ["flat"],
            "max_objects": 1,
            "split": "all",
            "size": 50,
        },
        {"scenes": Scenes},
        "data.source",
    )
    scenes = [source.scene(i) for i in range(len(source))]
    assert {(s.background, s.camera, s.style) for s in scenes} == {("black", "static", "flat")}
    assert {s.objects[0].motion for s in scenes} == {"left", "right"}
    with pytest.raises(IndexError, match="0 to 49, not 50"):
        source.scene(50)


def test_speed(capsys):
    source = Scenes()
    start = time.process_time()
    for i in range(300):
        record = source[i]
        record.read(TIMES)
    rate = 300 / (time.process_time() - start)
    with capsys.disabled():
        print(f"\nscenes: {rate:.0f} clips of 16x32x32 a second and core")
    assert rate > 100  # about 1000 on a quiet machine
