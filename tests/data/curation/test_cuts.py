"""Hard cuts and gradual transitions of planted footage, and what is none."""

import itertools

import cv2
import numpy as np
import pytest

from tests.data.planted_footage import (
    EVENTS,
    MOTIONS,
    Piece,
    assemble,
    camera_path,
    draw_photograph,
    render,
    shot,
)
from vdx.data.curation.cuts import CutDetector, correlation, motion_compensated_correlation
from vdx.data.curation.dissolves import WINDOW, DissolveDetector

FPS = 25
THRESHOLD = 0.5
FRAMES = 40


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [draw_photograph(rng) for _ in range(4)]


def small(frames):
    """Return frames uint8 [t h w 3] as look sees them."""
    return [
        cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), (160, 90), interpolation=cv2.INTER_AREA)
        for f in frames
    ]


def detect(detector, frames, fps=FPS):
    """Return the cuts that a detector finds, those above the threshold."""
    for number, grey in enumerate(frames):
        detector.add(number / fps, grey)
    detector.finish(len(frames) / fps)
    return [cut for cut in detector.cuts if cut["score"] >= THRESHOLD]


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_hard_cut_is_at_the_first_frame_of_the_new_shot(photographs, motion):
    rng = np.random.default_rng(1)
    pieces = [Piece(shot(rng, image, photographs, FRAMES, motion)) for image in photographs[:2]]
    frames, hard, _ = assemble(pieces)
    found = detect(CutDetector(), small(frames))
    assert [cut["time"] for cut in found] == [number / FPS for number in hard]
    assert found[0]["kind"] == "hard" and found[0]["start"] == found[0]["end"] == found[0]["time"]


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("seed", [2, 3])
def test_events_inside_a_shot_are_no_cuts(photographs, event, seed):
    rng = np.random.default_rng(seed)
    frames = small(shot(rng, photographs[2], photographs, FRAMES, "handheld", event))
    assert not detect(CutDetector(), frames)
    assert not detect(DissolveDetector(), frames)


@pytest.mark.parametrize(
    ("transition", "length"), [("dissolve", 10), ("dissolve", 24), ("fade", 20)]
)
def test_a_gradual_transition_is_where_frames_are_mixed(photographs, transition, length):
    rng = np.random.default_rng(4)
    first, second = (render(image, camera_path(rng, 60, "handheld")) for image in photographs[1:3])
    frames, _, gradual = assemble([Piece(first), Piece(second, transition, length)])
    frames = small(frames)
    assert not detect(CutDetector(), frames)
    (found,) = detect(DissolveDetector(), frames)
    assert found["kind"] == "gradual"
    ((start, end),) = gradual
    assert found["start"] * FPS == pytest.approx(start, abs=4)
    assert found["end"] * FPS == pytest.approx(end, abs=4)
    assert found["start"] <= found["time"] <= found["end"]


def test_frames_of_twice_the_rate_give_the_same_transition(photographs):
    rng = np.random.default_rng(5)
    first, second = (render(image, camera_path(rng, 60, "pan")) for image in photographs[:2])
    frames, *_ = assemble([Piece(first), Piece(second, "dissolve", 16)])
    frames = small(frames)
    doubled = list(itertools.chain.from_iterable(zip(frames, frames, strict=True)))
    assert detect(DissolveDetector(), doubled, 2 * FPS) == detect(DissolveDetector(), frames)


def test_memory_is_a_window_of_frames(photographs):
    frames = small(render(photographs[0], camera_path(np.random.default_rng(0), 20, "pan")))
    hard = CutDetector()
    gradual = DissolveDetector()
    for number in range(100):
        hard.add(number / FPS, frames[number % 20])
        gradual.add(number / FPS, frames[number % 20])
    assert len(hard._frames) < 20 and len(gradual._frames) == 2 * WINDOW + 1


@pytest.mark.parametrize("frames", [0, 1, 2, 5])
def test_short_footage_has_no_cut(photographs, frames):
    pixels = small(render(photographs[0], camera_path(np.random.default_rng(0), 5, "pan")))
    assert not detect(CutDetector(), pixels[:frames])
    assert not detect(DissolveDetector(), pixels[:frames])


def test_a_cut_between_few_frames_is_found(photographs):
    first, second = (small(image[None, 100:324, 100:500])[0] for image in photographs[:2])
    (found,) = detect(CutDetector(), [first] * 2 + [second] * 2)
    assert found["time"] == 2 / FPS


def test_motion_explains_a_moved_image_and_no_other(photographs):
    first, second = (small(image[None, 100:324, 100:500])[0] for image in photographs[:2])
    (moved,) = small(photographs[0][None, 104:328, 110:510])
    assert (
        motion_compensated_correlation(first, moved)
        > 0.8
        > 0.3
        > motion_compensated_correlation(first, second)
    )
    assert correlation(first, first) == pytest.approx(1, abs=0.05)
    black = np.zeros_like(first)
    assert (
        motion_compensated_correlation(black, black) == 1
        and motion_compensated_correlation(first, black) < 0.1
    )
