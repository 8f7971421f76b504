"""Each measure is right on true renders, sees the fault that is planted and nothing else."""

import dataclasses
import functools

import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.data.scenes.source import Scenes
from vdx.data.scenes.world import COMMANDED, MOTIONS, SPEEDS, Object, Scene
from vdx.data.signals import sparse_flow_hints
from vdx.evaluation.scene_truth import scene_truth
from vdx.metrics.control import (
    CONTROL_METRICS,
    control_scores,
    psnr,
    rank_correlation,
)
from vdx.metrics.optical_flow import lucas_kanade, pan_speed

FPS, COUNT = 8.0, 8
PATTERNED = ("stripes", "dots", "checks")
# The scenes in which each measure is taken; the others are of one object, the camera at rest.
SCENES = {
    "actions": {"motions": (COMMANDED,)},
    "camera": {"cameras": ("static", "pan left", "pan right"), "backgrounds": PATTERNED},
    "pose_angle": {"shapes": ("triangle", "star", "cross"), "motions": ("turn", "left")},
    "fps": {"motions": ("left", "right", "up", "down")},
}
# (worst value of true renders, worst with noise of 8 levels)
READER = {
    "first_frame": (99, 29),
    "last_frame": (99, 29),
    "depth": (0.07, 0.3),
    "depth_overlap": (0.88, 0.85),
    "pose": (0.07, 0.3),
    "pose_angle": (1.0, 3.0),
    "flow": (0.15, 0.25),
    "camera": (0.005, 0.012),
    "actions": (1.0, 0.97),
    "motion": (1.0, 0.9),
    "reference": (1.0, 1.0),
    "first_frame_motion": (1.0, 0.95),
    "fps": (0.03, 0.1),
}


def scenes_of(kind, count=COUNT, **more):
    source = Scenes(
        **{
            "max_objects": 1,
            "split": "all",
            "cameras": ("static",),
            "seed": 3,
            "motions": MOTIONS[:6],
            **SCENES.get(kind, {}),
            **more,
        }
    )
    return [source.scene(i) for i in range(count)]


def truths_of(scenes, fps=FPS, size=32, frames=8):
    return [scene_truth(scene, np.arange(frames) / fps, size, size) for scene in scenes]


@functools.cache
def asked(kind):
    """(truths, fps of each): for "fps" each scene at two rates."""
    if kind != "fps":
        return truths_of(scenes_of(kind)), [FPS] * COUNT
    pairs = [(truths_of([s], 4.0)[0], truths_of([s], 8.0)[0]) for s in scenes_of(kind, 4)]
    return [t for pair in pairs for t in pair], [4.0, 8.0] * 4


def scored(kind, fault):
    """The row of clips that are the true renders with a fault: fault(video) -> video."""
    truths, fps = asked(kind)
    return control_scores(kind, [fault(t["video"]) for t in truths], truths, fps)


def noisy(video, sigma=8.0):
    noise = np.random.default_rng(0).normal(0, sigma, video.shape)
    return np.clip(np.rint(video + noise), 0, 255).astype(np.uint8)


def tinted(video):
    return np.clip(video * 0.95 + np.array([6.0, 0.0, 3.0]), 0, 255).astype(np.uint8)


def no_worse(kind, value, bound):
    return value >= bound if CONTROL_METRICS[kind].higher else value <= bound


@pytest.mark.parametrize("kind", CONTROL_METRICS)
def test_true_renders_reach_the_goal_and_what_others_asked_for_does_not(kind):
    row = scored(kind, lambda video: video)
    assert row["model"] == row["true"] and no_worse(kind, row["true"], READER[kind][0]), row
    assert row["reached"] and row["valid"] == 1.0
    assert not no_worse(kind, row["shuffled"], row["goal"]), row
    assert set(row) == {
        "signal",
        "measure",
        "unit",
        "higher",
        "goal",
        "model",
        "true",
        "shuffled",
        "valid",
        "reached",
    }


@pytest.mark.parametrize("kind", CONTROL_METRICS)
def test_noise_is_no_fault(kind):
    row = scored(kind, lambda v: noisy(v, 1.0 if kind == "motion" else 8.0))  # noise is motion
    assert no_worse(kind, row["model"], READER[kind][1]), row
    assert row["valid"] == 1.0


@pytest.mark.parametrize(
    "kind", [k for k in CONTROL_METRICS if k not in ("first_frame", "last_frame")]
)
def test_a_tint_is_no_fault(kind):
    row = scored(kind, tinted)
    assert row["reached"] and no_worse(kind, row["model"], READER[kind][1]), row


@pytest.mark.parametrize("kind", CONTROL_METRICS)
def test_empty_clips_reach_nothing(kind):
    row = scored(kind, np.zeros_like)
    assert not row["reached"] and no_worse(kind, row["true"], READER[kind][0])


def frozen(video):
    return np.broadcast_to(video[:1], video.shape).copy()


def backwards(video):
    return video[::-1].copy()


def mirrored(video):
    return video[:, :, ::-1].copy()


def recoloured(video):
    return np.roll(video, 1, -1)


@pytest.mark.parametrize(
    "kind, fault, low, high",
    [
        ("depth", frozen, 0.5, 3.0),
        ("depth", recoloured, 0.0, 0.1),
        ("depth_overlap", frozen, 0.5, 0.85),
        ("pose_angle", mirrored, 12, 60),
        ("first_frame", backwards, 5, 25),
        ("first_frame", frozen, 99, 99),
        ("first_frame_motion", frozen, 0, 0.1),
        ("first_frame_motion", backwards, 0, 0.3),
        ("last_frame", frozen, 5, 25),
        ("flow", frozen, 0.35, 0.6),
        ("flow", backwards, 0.8, 1.3),
        ("camera", frozen, 0.05, 0.1),
        ("camera", backwards, 0.1, 0.2),
        ("camera", recoloured, 0, 0.01),
        ("actions", frozen, 0.05, 0.45),
        ("actions", mirrored, 0.3, 0.8),
        ("reference", recoloured, 0.0, 0.3),
        ("reference", frozen, 1, 1),
        ("fps", frozen, np.nan, np.nan),
        ("motion", frozen, np.nan, np.nan),
    ],
)
def test_a_planted_fault_shows_and_its_control_does_not(kind, fault, low, high):
    row = scored(kind, fault)
    if np.isnan(low):
        assert np.isnan(row["model"]) and not row["reached"]
    else:
        assert low <= row["model"] <= high, row


def test_noise_of_known_size_has_the_psnr_of_the_formula():
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert psnr(noisy(grey, 5.0), grey) == pytest.approx(20 * np.log10(255 / 5.0), abs=0.1)
    assert psnr(grey, grey) == 99.0


def changed(kind, **by):
    """The row of clips whose objects have numbers that differ from those asked for."""
    other = [
        dataclasses.replace(
            s,
            objects=(
                dataclasses.replace(
                    s.objects[0],
                    **{key: getattr(s.objects[0], key) + more for key, more in by.items()},
                ),
            ),
        )
        for s in scenes_of(kind)
    ]
    return control_scores(kind, [t["video"] for t in truths_of(other)], *asked(kind))


@pytest.mark.parametrize(
    "kind, by, value, within",
    [
        ("depth", {"x": 1 / 32}, 1.0, 0.03),
        ("pose", {"y": -1 / 32}, 1.0, 0.03),
        ("pose", {"x": 1 / 32, "y": 1 / 32}, 2**0.5, 0.03),
        ("depth", {"angle": 0.3}, 0.0, 0.08),
        ("pose_angle", {"angle": np.radians(20)}, 20, 1),
        ("pose_angle", {"x": 1 / 32}, 0, 1),
        ("depth_overlap", {"radius": -0.06}, 0.45, 0.12),
        ("flow", {"angle": 0.3}, 0.08, 0.08),
        ("actions", {"x": 1 / 32}, 1.0, 0),
        ("reference", {"x": 1 / 32}, 1.0, 0),
    ],
)
def test_an_object_elsewhere_is_measured_as_far_as_it_is(kind, by, value, within):
    row = changed(kind, **by)
    assert row["model"] == pytest.approx(value, abs=within), row


def test_another_shape_is_another_subject():
    scenes = scenes_of("reference", shapes=("square", "cross"))
    other = [
        dataclasses.replace(s, objects=(dataclasses.replace(s.objects[0], shape="triangle"),))
        for s in scenes
    ]
    row = control_scores(
        "reference", [t["video"] for t in truths_of(other)], truths_of(scenes), FPS
    )
    assert row["model"] == 0 and row["true"] == 1


def test_what_is_not_seen_is_not_measured_and_too_much_of_it_reaches_nothing():
    truths = truths_of(scenes_of("depth", backgrounds=("black",)))
    for gone, reached in ((1, True), (3, False)):
        videos = [t["video"].copy() for t in truths]
        for video in videos:
            video[4 : 4 + gone] = 0
        row = control_scores("depth", videos, truths, FPS)
        assert row["model"] < 0.15 and row["valid"] == 1 - gone / 8 and row["reached"] == reached


def test_a_frame_rate_that_is_ignored_is_one_octave_wrong():
    truths, fps = asked("fps")
    videos = [truths[i - i % 2]["video"] for i in range(len(truths))]
    row = control_scores("fps", videos, truths, fps)
    assert row["model"] == pytest.approx(1.0, abs=0.03) and not row["reached"]


def test_motion_strength_is_a_matter_of_order():
    truths, fps = asked("motion")
    order = np.argsort([t["motion"] for t in truths])
    videos = [None] * COUNT
    for one, other in zip(order, order[::-1], strict=True):
        videos[one] = truths[other]["video"]
    assert control_scores("motion", videos, truths, fps)["model"] == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / 22.5**0.5)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3])) and np.isnan(rank_correlation([1], [1]))


def test_a_moving_object_is_not_a_pan():
    scenes = scenes_of("camera", 6, cameras=("static",), motions=("left", "right"))
    row = control_scores("camera", [t["video"] for t in truths_of(scenes)], truths_of(scenes), FPS)
    assert row["model"] < 0.005
    plain = truths_of(scenes_of("camera", 3, cameras=("static",), backgrounds=("black", "grey")))
    row = control_scores("camera", [t["video"] for t in plain], plain, FPS)
    assert row["valid"] == 0 and np.isnan(row["model"]) and not row["reached"]


@pytest.mark.parametrize("fps, size", [(4.0, 32), (16.0, 32), (8.0, 64)])
def test_a_pan_is_measured_at_other_rates_and_sizes(fps, size):
    for truth in truths_of(scenes_of("camera", 3), fps, size):
        still = truth["depth"][..., 0] == 0
        assert pan_speed(truth["video"], fps, still) == pytest.approx(truth["pan"], abs=0.015)


def textured(shift, size=64):
    """Smooth noise, moved by (dx, dy) through its own formula."""
    rng = np.random.default_rng(0)
    y, x = np.indices((size, size)) + 0.5
    waves = [
        (rng.uniform(0.2, 0.7, 2), rng.uniform(0, 6.3), rng.uniform(10, 25, 3)) for _ in range(12)
    ]
    picture = sum(
        np.sin((x - shift[0]) * k[0] + (y - shift[1]) * k[1] + phase)[..., None] * tone
        for k, phase, tone in waves
    )
    return np.clip(128 + picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shift", [(0, 0), (0.3, -0.2), (1.5, 0.8), (-3.0, 2.0)])
def test_the_flow_of_a_texture_is_its_shift(shift):
    found = lucas_kanade(textured((0, 0)), textured(shift))[6:-6, 6:-6]
    assert np.linalg.norm(found - shift, axis=-1).mean() < 0.12


def test_a_long_way_of_a_plain_object_is_found_from_coarse_to_fine():
    scene = Scene((Object("square", "white", "right", "large", "slow", 0.4, radius=0.25),))
    truth = scene_truth(scene, np.array([0.0, 8 / 64 / SPEEDS["slow"]]), 64, 64)
    error = np.linalg.norm(lucas_kanade(*truth["video"]) - (8, 0), axis=-1)
    assert error[truth["depth"][0, ..., 0] > 0.5].mean() < 0.1


@pytest.mark.parametrize(
    "motion, most",
    [
        ("left", 0.07),
        ("up", 0.07),
        ("grow", 0.07),
        ("shrink", 0.13),
        ("turn", 0.5),
        (COMMANDED, 0.1),
    ],
)
def test_the_flow_of_an_object_is_what_was_asked_for(motion, most):
    """As the docstring says of true scenes."""
    errors, sizes = [], []
    for truth in truths_of(scenes_of("flow", 8, motions=(motion,))):
        there = truth["depth"][2, ..., 0] > 0.5
        found, wanted = lucas_kanade(*truth["video"][2:4]), truth["flow"][2, ..., :2]
        errors.append(np.linalg.norm(found - wanted, axis=-1)[there].mean())
        sizes.append(np.linalg.norm(wanted, axis=-1)[there].mean())
    assert np.mean(errors) < most < np.mean(sizes)


def test_goals_in_pixels_grow_with_the_frame_and_a_lone_clip_has_no_shuffle():
    truths = truths_of(scenes_of("depth", 1), size=64)
    row = control_scores("depth", [t["video"] for t in truths], truths, FPS)
    assert row["goal"] == 2.0 and np.isnan(row["shuffled"]) and row["reached"]


def test_flow_that_is_given_at_a_few_points_is_measured_there():
    truths, _ = asked("flow")
    few = [
        {**t, "flow": sparse_flow_hints(t["flow"][..., :2], 4, np.random.default_rng(0))}
        for t in truths
    ]
    row = control_scores("flow", [t["video"] for t in truths], few, FPS)
    assert row["model"] < 0.15 and row["reached"]


def test_what_cannot_be_compared_is_refused():
    truths, _ = asked("depth")
    videos = [t["video"] for t in truths]
    with pytest.raises(ConfigError, match="Did you mean 'depth'"):
        control_scores("dept", videos, truths, FPS)
    with pytest.raises(ValueError, match="got 7 clips and 8 truths"):
        control_scores("depth", videos[1:], truths, FPS)
    with pytest.raises(
        ValueError, match=r"Clip 0 is uint8 \[7, 32, 32, 3\].*must have the same type and shape"
    ):
        control_scores("depth", [v[1:] for v in videos], truths, FPS)
