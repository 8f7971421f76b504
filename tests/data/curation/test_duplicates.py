"""Near-duplicates: recompressed, resized, mirrored, shifted; and clips that are none."""

import cv2
import numpy as np
import pytest

from tests.data.planted_footage import camera_path, draw_photograph, render
from vdx.data.curation.duplicates import Hashed, distance, find_duplicates
from vdx.data.curation.fingerprint import BLANK, RATE, Fingerprint, hashes_between

FPS = 8
LIMIT = 0.2


@pytest.fixture(scope="module")
def shots() -> list[np.ndarray]:
    """Grey frames uint8 [t h w] of six shots."""
    rng = np.random.default_rng(0)
    return [render(draw_photograph(rng), camera_path(rng, 24, "pan"))[..., 1] for _ in range(6)]


def hashes_of(frames, fps=FPS):
    """Return the hashes of frames that are shown at a rate."""
    fingerprint = Fingerprint()
    for number, frame in enumerate(frames):
        fingerprint.add(number / fps, frame)
    fingerprint.finish(len(frames) / fps)
    return fingerprint.hashes


def clip(frames, shot=("a", 0), fps=FPS):
    return Hashed(hashes_between(hashes_of(frames, fps), 0, len(frames) / fps), shot)


def altered(frames, kind):
    """Return a near-duplicate of frames."""
    if kind == "resized":
        return np.stack([cv2.resize(f, (120, 80), interpolation=cv2.INTER_AREA) for f in frames])
    if kind == "mirrored":
        return frames[..., ::-1].copy()
    if kind == "brighter":
        return np.clip(frames * 0.8 + 40, 0, 255).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 8, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def test_there_is_a_hash_for_each_sample_of_time(shots):
    hashes = hashes_of(shots[0])
    assert len(hashes) == 24 / FPS * RATE
    assert hashes_of(shots[0].repeat(3, axis=0), 3 * FPS) == hashes
    assert len(hashes_between(hashes, 0.5, 2.0)) == 1.5 * RATE
    assert set(hashes_of(np.full((8, 90, 160), 30, np.uint8))) == {BLANK}


@pytest.mark.parametrize("kind", ["resized", "mirrored", "brighter", "noisy"])
def test_near_duplicates_are_found(shots, kind):
    clips = [clip(frames, ("a", n)) for n, frames in enumerate(shots)]
    copies = [clip(altered(frames, kind), ("b", n)) for n, frames in enumerate(shots)]
    assert find_duplicates(clips + copies, LIMIT) == [None] * 6 + list(range(6))
    near = [distance(a.hashes, b.hashes) for a, b in zip(clips, copies, strict=True)]
    assert max(near) < LIMIT


def test_a_part_of_a_clip_is_a_duplicate_of_it(shots):
    part = clip(shots[0][6:22], ("b", 0))
    assert find_duplicates([clip(shots[0]), part], LIMIT) == [None, 0]


def test_pieces_of_a_shot_and_blank_clips_are_none(shots):
    still = shots[0][:1].repeat(24, axis=0)
    assert find_duplicates([clip(still), clip(still)], LIMIT) == [None, None]
    assert find_duplicates([clip(still), clip(still, ("a", 1))], LIMIT) == [None, 0]
    black = np.zeros_like(still)
    assert find_duplicates([clip(black), clip(black, ("b", 0))], LIMIT) == [None, None]


def test_of_several_copies_all_repeat_the_first(shots):
    copies = [clip(shots[0], (name, 0)) for name in "abc"]
    assert find_duplicates(copies, LIMIT) == [None, 0, 0]
