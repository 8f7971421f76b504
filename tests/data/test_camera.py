"""Rays meet the points that pixels show; files of cameras survive a round trip."""

import json

import numpy as np
import pytest

from vdx.data.camera import cropped, plucker, read_camera, write_camera
from vdx.data.scenes.drawing import background
from vdx.data.scenes.signals import camera
from vdx.data.scenes.world import Object, Scene


def turned(angle, axis):
    """A rotation by Rodrigues' formula."""
    k = np.cross(np.eye(3), np.asarray(axis) / np.linalg.norm(axis))
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def cameras(seed=0, count=4):
    rng = np.random.default_rng(seed)
    matrices = np.zeros((count, 3, 3))
    matrices[:, [0, 1, 0, 1], [0, 1, 2, 2]] = rng.uniform(0.4, 1.2, (count, 4))
    matrices[:, 2, 2] = 1
    turns = np.stack(
        [
            turned(a, v)
            for a, v in zip(rng.uniform(-1, 1, count), rng.normal(size=(count, 3)), strict=True)
        ]
    )
    return matrices, np.concatenate([turns, rng.normal(size=(count, 3, 1))], -1)


def test_a_ray_passes_through_the_points_that_its_pixel_shows():
    """The ray of a pixel contains the world points that the pixel shows.

    A world point is projected by the textbook's matrices into each camera. It must be on the ray
    of that pixel: p x d = m, in the coordinates of the first camera.
    """
    intrinsics, extrinsics = cameras()
    rng, size = np.random.default_rng(1), 12
    rays = plucker(intrinsics, extrinsics, size, size).astype(np.float64)
    first = extrinsics[0]
    for i, (k, e) in enumerate(zip(intrinsics, extrinsics, strict=True)):
        for _ in range(20):
            row, col = rng.integers(size, size=2)
            depth = rng.uniform(0.5, 3)
            there = depth * np.linalg.solve(k, [(col + 0.5) / size, (row + 0.5) / size, 1])
            world = np.linalg.solve(e[:, :3], there - e[:, 3])
            seen = k @ (e[:, :3] @ world + e[:, 3])
            np.testing.assert_allclose(seen[:2] / seen[2] * size, [col + 0.5, row + 0.5])
            point = first[:, :3] @ world + first[:, 3]
            moment, d = np.split(rays[i, row, col], 2)
            np.testing.assert_allclose(np.cross(point, d), moment, atol=2e-6)
            assert np.linalg.norm(d) == pytest.approx(1, abs=1e-6)
            centre = first[:, :3] @ -e[:, :3].T @ e[:, 3] + first[:, 3]
            assert d @ (point - centre) > 0  # it points away from the camera


def test_only_the_way_from_the_first_camera_matters():
    intrinsics, extrinsics = cameras()
    rays = plucker(intrinsics, extrinsics, 5, 7)
    assert rays.shape == (4, 5, 7, 6) and rays.dtype == np.float32
    np.testing.assert_allclose(rays[0, ..., :3], 0, atol=1e-12)
    world = np.vstack([np.concatenate([turned(1, [1, 2, 3]), [[5], [6], [7]]], 1), [0, 0, 0, 1]])
    np.testing.assert_allclose(plucker(intrinsics, extrinsics @ world, 5, 7), rays, atol=1e-6)
    assert np.abs(rays[1:, ..., :3]).mean() > 0.1


def test_the_camera_of_a_scene_sees_the_background_that_is_drawn():
    """The ray of a pixel meets the plane at depth 1 where the pattern at rest has its colour."""
    scene = Scene((Object("circle", "red", "left", "small", "slow"),), "dots", "pan left")
    times, h, w = np.array([0.0, 0.7, 1.9]), 40, 64
    found = camera(scene, times, h, w)
    rays = plucker(found[..., :3], found[..., 3:], h, w).astype(np.float64)
    moment, d = rays[..., :3], rays[..., 3:]
    near = np.cross(d, moment)  # the point of the ray nearest to the origin
    hit = near + ((1 - near[..., 2]) / d[..., 2])[..., None] * d
    for i, shift in enumerate(scene.shift(times)):
        np.testing.assert_allclose(
            (hit[i, ..., 0] + 0.5 + shift) * w,
            np.broadcast_to(np.arange(w) + 0.5, (h, w)),
            atol=1e-4,
        )
        np.testing.assert_allclose(
            (hit[i, ..., 1] + h / w / 2) * w,
            np.broadcast_to(np.arange(h)[:, None] + 0.5, (h, w)),
            atol=1e-4,
        )
    still = background("dots", np.zeros(1), h, w)[0]
    moved = background("dots", scene.shift(times[2:]), h, w)[0]
    cols, rows = ((hit[2, ..., k] + (0.5, h / w / 2)[k]) * w - 0.5 for k in (0, 1))
    inside = (cols > 0) & (cols < w - 1)
    whole = still[np.rint(rows).astype(int)[inside], np.rint(cols).astype(int)[inside]]
    assert np.abs(whole - moved[inside]).mean() < 4 < np.abs(still - moved).mean()


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (30, 30)])
def test_a_cropped_camera_sees_the_middle_of_what_the_whole_one_saw(size):
    """Rays are equal at pixels that both pictures have."""
    intrinsics, extrinsics = cameras()
    whole = plucker(intrinsics, extrinsics, 40, 40)
    part = plucker(cropped(intrinsics, (40, 40), *size), extrinsics, *size)
    h, w = size
    if max(size) == 40:  # only cropped
        top, left = (40 - h) // 2, (40 - w) // 2
        np.testing.assert_allclose(part, whole[:, top : top + h, left : left + w], atol=1e-6)
    else:  # only made smaller: corners of pixels go on corners
        np.testing.assert_allclose(part[:, 0, 0], whole[:, 0, 0], atol=0.02)
        np.testing.assert_allclose(cropped(intrinsics, (40, 40), *size), intrinsics, atol=1e-12)


@pytest.mark.parametrize("zooms", [True, False])
def test_a_file_survives_a_round_trip(tmp_path, zooms):
    intrinsics, extrinsics = cameras()
    intrinsics = intrinsics if zooms else np.broadcast_to(intrinsics[:1], intrinsics.shape)
    write_camera(tmp_path / "a.json", intrinsics, extrinsics)
    found = read_camera(tmp_path / "a.json", 4)
    np.testing.assert_array_equal(found[0], intrinsics)
    np.testing.assert_array_equal(found[1], extrinsics)
    assert len(json.loads((tmp_path / "a.json").read_text())["intrinsics"]) == 4


STILL = np.eye(3, 4).tolist()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected .*intrinsics"),
        ({"intrinsics": [1, 1, 0.5, 0.5], "frames": []}, '"frames" is empty'),
        ({"intrinsics": [1, 1, 0.5, 0.5], "frames": [[1, 2]]}, r"\[1, 2\], expected one world-to"),
        ({"intrinsics": [1, 1, 0.5, 0.5], "frames": [[1], [1, 2]]}, "equally long"),
        ({"intrinsics": [1, 1, 0.5, 0.5], "frames": [STILL] * 2}, "has 2 cameras, .* has 3 frames"),
        (
            {"intrinsics": [1, 1, 0.5, 0.5], "frames": [STILL, STILL, (-np.eye(3, 4)).tolist()]},
            "frame 2 are no rotation",
        ),
        ({"intrinsics": [1, 1, 0.5], "frames": [STILL] * 3}, r"\[3\], expected \[fx, fy"),
        (
            {"intrinsics": [500, 500, 320, 240], "frames": [STILL] * 3},
            "divide fx and cx by its width",
        ),
        (
            {"intrinsics": [1, None, 0.5, 0.5], "frames": [STILL] * 3},
            '"intrinsics" is empty or not',
        ),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_fault(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        read_camera(path, 3)
