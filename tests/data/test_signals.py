"""Control signals match the frames, at the same instants and sizes, from scenes or files."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vdx.config.build import ConfigError
from vdx.data.camera import plucker, write_camera
from vdx.data.motion import motion_score
from vdx.data.record import BadRecord, Record
from vdx.data.resize import resize
from vdx.data.scenes.drawing import COLOURS, SHAPES, paint
from vdx.data.scenes.signals import camera, depth, flow, pose, reference
from vdx.data.scenes.source import Scenes
from vdx.data.scenes.world import MOTIONS, Object, Scene
from vdx.data.signals import ACTIONS, SIGNALS, sparse_flow_hints
from vdx.data.sources import VideoFolder
from vdx.data.transforms import ClipSampling, to_example
from vdx.generate.video_io import write_video

TIMES = np.arange(8) / 8.0
SIZE = {"height": 32, "width": 48}


def scene(
    shape="square",
    motion="right",
    angle=0.0,
    background="black",
    camera="static",
    style="flat",
    second=False,
):
    where = {"left": (0.7, 0.5), "up": (0.4, 0.7), "bounce": (0.4, 0.8)}.get(motion, (0.35, 0.4))
    one = Object(
        shape,
        "white",
        motion,
        "large",
        "slow",
        *where,
        radius=0.25,
        angle=angle,
        rise=0.4,
        phase=0.1,
    )
    two = Object("circle", "white", "down", "large", "slow", 0.5, 0.4, radius=0.3)
    return Scene((one, two) if second else (one,), background, camera, style)


def example(record, signals=tuple(SIGNALS), seed=0, height=32, width=32, frames=8, **clip):
    return to_example(
        record,
        clip=ClipSampling(**{"num_frames": frames, "fps": 8.0, **clip}),
        height=height,
        width=width,
        num_frames=frames,
        signals=signals,
        rng=np.random.default_rng(seed),
        tokenize=lambda _: (np.zeros(4, np.int32), np.ones(4, bool)),
    )


def centroid(picture):
    """Return [t 2] of pictures [t h w], in pixels."""
    height, width = picture.shape[1:]
    x = (picture.sum(1) * (np.arange(width) + 0.5)).sum(-1)
    y = (picture.sum(2) * (np.arange(height) + 0.5)).sum(-1)
    return np.stack([x, y], -1) / picture.sum((1, 2))[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_depth_is_one_where_the_object_is_drawn(shape):
    one = scene(shape, "turn" if shape == "star" else "down", angle=0.3)
    found = depth(one, TIMES, **SIZE)
    drawn = one.render(TIMES, **SIZE)[..., :1] / 246.0
    assert found.dtype == np.float32 and found.shape == (8, 32, 48, 1)
    np.testing.assert_allclose(found, drawn, atol=0.5 / 246 + 1e-6)


def test_the_object_behind_is_half_as_near_and_hidden():
    found = depth(scene(second=True), TIMES, **SIZE)[..., 0]
    alone = depth(scene(), TIMES, **SIZE)[..., 0]
    assert (found[alone == 1] == 1).all()
    behind = found[alone == 0]
    assert (behind == 0.5).sum() > 200 and (behind <= 0.5).all() and (behind == 0).any()


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.4])
def test_the_skeleton_stands_where_the_object_stands(angle):
    one = scene("triangle", "turn", angle)
    found, state = pose(one, TIMES, 64, 64), one.state(TIMES)[0]
    assert found.dtype == np.float32 and found.min() == 0 and found.max() == 1
    centre = state["center"] * 64
    np.testing.assert_allclose(centroid(found[..., 0]), centre, atol=0.05)
    half = centroid(found[..., 1]) - centre
    up = np.stack([np.sin(state["angle"]), -np.cos(state["angle"])], -1)
    np.testing.assert_allclose(half, up * 0.25 * 64 / 2, atol=0.2)
    tip = centroid(depth(one, TIMES, 64, 64)[..., 0] * (np.indices((64, 64))[None, 0] >= 0))
    np.testing.assert_allclose(tip, centre, atol=0.1)  # a triangle's centroid is its centre
    # One radius up is inside the triangle with its tip at 1.12 radii, one radius down is not.
    drawn = depth(one, TIMES, 64, 64)[..., 0]
    for sign, inside in ((1, True), (-1, False)):
        x, y = (centre + sign * 0.9 * up * 16).T.astype(int)
        assert ((drawn[np.arange(8), y, x] > 0.5) == inside).all()
    assert not found[..., 2].any()
    second = pose(scene(second=True), TIMES, 64, 64)[..., 2]
    assert second.max() == 1 and abs(centroid(second)[0, 0] - 32) < 0.1


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_pixel_goes_where_the_flow_leads(motion):
    """The brightness of a soft star is a texture that moves with it.

    The star is darker towards its edge in proportion to its radius. Where a pixel goes, the star
    of the next frame has the same brightness.
    """
    one, size = scene("star", motion, 0.4), 48
    found, state = flow(one, TIMES, size, size), one.state(TIMES)[0]
    assert found.shape == (8, 48, 48, 2) and not found[-1].any()
    rows, cols = np.indices((size, size)) + 0.5

    def brightness(i, x, y):
        centre = state["center"][i] * size
        return paint(
            "star",
            "soft",
            (x - centre[0]).astype(np.float32),
            (y - centre[1]).astype(np.float32),
            state["size"][i] * size,
            state["angle"][i],
        )[0]

    inside = depth(one, TIMES, size, size)[..., 0] >= 0.5
    for i in range(7):
        x, y = cols + found[i, ..., 0], rows + found[i, ..., 1]
        before, after = brightness(i, cols, rows), brightness(i + 1, x, y)
        np.testing.assert_allclose(after[inside[i]], before[inside[i]], atol=2e-4)
        assert np.abs(brightness(i + 1, cols, rows) - before)[inside[i]].max() > 0.02
        assert not found[i][~inside[i]].any()


def test_the_background_flows_with_the_camera():
    found = flow(scene("circle", "grow", camera="pan left", background="dots"), TIMES, **SIZE)
    corner = found[:-1, 0, 0]
    np.testing.assert_allclose(corner, [[0.1 / 8 * 48, 0]] * 7, rtol=1e-5)


def test_the_reference_is_the_subject_alone():
    for i in range(20):
        one = Scenes(motions=("turn", "left")).scene(i)
        found = reference(one, TIMES, 40, 40)
        item = one.objects[0]
        upright = Object(item.shape, item.colour, "grow", "large", "slow", radius=0.25)
        drawn = Scene((upright,), "black", "static", one.style).render(np.zeros(1), 40, 40)
        np.testing.assert_array_equal(found, drawn)


def test_an_example_has_the_requested_signals_in_the_documented_form():
    record = Scenes(height=32, width=32, max_objects=1)[3]
    found = example(record)
    forms = {
        "depth": (8, 32, 32, 1),
        "pose": (8, 32, 32, 3),
        "flow": (8, 32, 32, 3),
        "camera": (8, 32, 32, 6),
        "actions": (8,),
        "motion": (),
        "reference": (32, 32, 3),
    }
    assert set(forms) == set(SIGNALS) == set(found) - set(example(record, ()))
    for name, shape in forms.items():
        kind = {"actions": np.int32, "reference": np.uint8}.get(name, np.float32)
        assert (found[name].shape, found[name].dtype) == (shape, kind), name
    plain = example(record, ())
    assert all(np.array_equal(plain[k], found[k]) for k in plain)  # signals change nothing else
    times, _ = ClipSampling(8, fps=8.0).times(record, 8, np.random.default_rng(0))
    np.testing.assert_array_equal(found["depth"], record.tracks["depth"](times))
    pickled = pickle.loads(pickle.dumps(record)).tracks["flow"](times)
    np.testing.assert_array_equal(found["flow"][..., :2], pickled)
    assert (found["flow"][:-1, ..., 2] == 1).all() and not found["flow"][-1].any()


def test_maps_follow_the_frames_through_resizing():
    """Wide frames are made small and cropped: map and picture have the object at one place."""
    one, panned = scene("circle", "right"), scene(camera="pan left", background="dots")
    source = Scenes(height=64, width=96, max_objects=1)
    record = dataclasses.replace(
        source[0],
        read=lambda t: one.render(t, 64, 96),
        tracks={
            "depth": lambda t: depth(one, t, 64, 96),
            "flow": lambda t: flow(one, t, 64, 96),
            "reference": lambda t: reference(one, t, 64, 96),
            "camera": lambda t: camera(panned, t, 64, 96),
        },
    )
    found = example(record, ("depth", "flow", "reference", "camera"), start="first")
    drawn = found["video"][..., 0] / 246.0
    np.testing.assert_allclose(centroid(found["depth"][..., 0]), centroid(drawn), atol=0.03)
    inside = found["depth"][:-1, ..., 0] > 0.999
    step = np.diff(centroid(drawn), axis=0)
    for i in range(4):
        np.testing.assert_allclose(
            np.median(found["flow"][i][inside[i]][:, :2], 0), step[i], atol=0.05
        )
    assert step[0, 0] > 0.5 and found["reference"].shape == (32, 32, 3)
    assert found["depth"].min() >= 0 and found["depth"].max() <= 1
    whole = camera(panned, TIMES, 64, 96)
    rays = plucker(whole[..., :3], whole[..., 3:], 64, 96)[:, :, 16:80]  # the part that is kept
    halved = rays.reshape(8, 32, 2, 32, 2, 6).mean((2, 4))
    np.testing.assert_allclose(found["camera"], halved, atol=1e-3)


def test_sparse_flow_hints_are_a_few_points_that_move_with_the_object():
    one = scene("circle", "right")
    dense = flow(one, TIMES, 32, 32)
    found = sparse_flow_hints(dense, 3, np.random.default_rng(0))
    assert (found[:-1, ..., 2].sum((1, 2)) == 3).all() and not found[-1].any()
    assert not found[found[..., 2] == 0].any()
    np.testing.assert_array_equal(found[..., :2][found[..., 2] == 1], dense[found[..., 2] == 1])
    starts = [sparse_flow_hints(dense, 1, np.random.default_rng(s)) for s in range(30)]
    moving = [f for f in starts if f[0, ..., :2].any()]
    assert len(moving) > 15  # hints are where something happens
    lasts = [(np.abs(f[:-1, ..., 0]).sum((1, 2)) > 0).sum() for f in moving]
    assert np.mean(np.array(lasts) == 7) > 0.8  # and stay with what they mark, but on its edge
    record = Scenes(max_objects=1)[0]
    few, many = (example(record, ("flow",), flow_points=n)["flow"][0, ..., 2] for n in (2, 9))
    assert few.sum() == 2 and many.sum() == 9


def test_a_point_that_leaves_the_frame_is_no_longer_a_hint():
    found = sparse_flow_hints(
        np.full((6, 8, 8, 2), (2.0, 0.0), np.float32), 4, np.random.default_rng(0)
    )
    counts = found[..., 2].sum((1, 2))
    assert counts[0] == 4 and counts[4] == 0 and (np.diff(counts) <= 0).all()


def test_motion_is_a_change_in_a_second():
    flash = np.zeros((8, 4, 4, 3), np.uint8)
    flash[::2] = 255
    assert motion_score(flash, 8.0) == pytest.approx(800.0)
    assert motion_score(flash[:1], 8.0) == 0.0 == motion_score(flash[::2], 8.0)
    one = scene("square", "right")
    slow, fast = (motion_score(one.render(np.arange(n) / n, 64, 64), n) for n in (4, 16))
    assert slow == pytest.approx(fast, rel=0.05) and slow > 1
    with pytest.raises(ValueError, match="uint8"):
        motion_score(flash.astype(np.float32), 8.0)


def test_a_record_without_a_track_is_named_and_an_unknown_signal_refused():
    bare = Record("clip", "x", 2.0, None, lambda t: np.zeros((len(t), 32, 32, 3), np.uint8))
    with pytest.raises(BadRecord, match="clip: has no pose; it has no tracks"):
        example(bare, ("pose",))
    wrong = dataclasses.replace(bare, tracks={"depth": lambda t: np.zeros((len(t), 4, 4, 2))})
    with pytest.raises(BadRecord, match=r"gave depth float64 \[8, 4, 4, 2\], expected float32"):
        example(wrong, ("depth",))
    tall = dataclasses.replace(
        bare, tracks={"depth": lambda t: np.zeros((len(t), 64, 32, 1), np.float32)}
    )
    with pytest.raises(BadRecord, match="depth is 64x32, which is not the shape of the frames"):
        example(tall, ("depth",))
    with pytest.raises(ConfigError, match="Did you mean 'depth'"):
        example(bare, ("dept",))
    with pytest.raises(ValueError, match="flow_points = -1"):
        ClipSampling(8, fps=8.0, flow_points=-1)


def test_other_footage_is_its_own_reference():
    levels = lambda t: np.broadcast_to(
        (t * 100).astype(np.uint8)[:, None, None, None], (len(t), 32, 32, 3)
    )
    record = Record("clip", "x", 2.0, np.arange(8) / 4, levels)
    found = {
        int(example(record, ("reference",), seed=s, frames=4, fps=4.0)["reference"].mean())
        for s in range(60)
    }
    assert found == {int(100 * i / 4) for i in range(8)}


# Track files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a folder whose clip and tracks come from one scene, at 8 frames per second."""
    path, one, times = tmp_path_factory.mktemp("folder"), scene("circle", "right"), np.arange(9) / 8
    write_video(path / "a.mp4", one.render(times, 64, 64), 8, min_side=64)
    np.save(path / "depth.npy", depth(one, times, 64, 64)[..., 0])
    np.save(path / "flow.npy", flow(one, times, 64, 64))
    write_video(
        path / "pose.mp4", (pose(one, times, 64, 64) * 255).astype(np.uint8), 8, min_side=64
    )
    write_camera(
        path / "camera.json",
        np.broadcast_to(np.diag([1.0, 1.0, 1.0]), (9, 3, 3)),
        np.stack([np.concatenate([np.eye(3), [[i], [0], [0]]], 1) for i in range(9)]),
    )
    (path / "actions.json").write_text(json.dumps(["right", 2, "up", "stay", *["down"] * 5]))
    Image.fromarray(reference(one, times, 64, 64)[0]).save(path / "reference.png")
    return path, one


TRACKS = {
    "depth": "depth.npy",
    "pose": "pose.mp4",
    "flow": "flow.npy",
    "camera": "camera.json",
    "actions": "actions.json",
    "reference": "reference.png",
}


def clip_of(path, **tracks):
    (path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.mp4", "caption": "a circle", **tracks}) + "\n"
    )
    return VideoFolder(str(path))[0]


@pytest.mark.parametrize("fps, step", [(8.0, 1), (4.0, 2)])
def test_track_files_are_read_at_the_instants_of_the_clip(folder, fps, step):
    path, one = folder
    found = example(clip_of(path, **TRACKS), frames=4, fps=fps, start="first")
    times = np.arange(4) / fps
    whole = {
        name: resize(read(one, times, 64, 64), 32, 32)
        for name, read in (("depth", depth), ("pose", pose), ("flow", flow))
    }
    np.testing.assert_allclose(found["depth"], whole["depth"], atol=1e-6)
    assert np.abs(found["pose"] - whole["pose"]).mean() < 0.02  # it was compressed
    both = (found["flow"][..., 0] != 0) & (whole["flow"][..., 0] != 0)
    np.testing.assert_allclose(found["flow"][both][:, :2], whole["flow"][both] / 2, atol=0.12)
    moves = np.broadcast_to(np.eye(3, 4), (4, 3, 4)).copy()
    moves[:, 0, 3] = step * np.arange(4)
    np.testing.assert_array_equal(
        found["camera"], plucker(np.broadcast_to(np.eye(3), (4, 3, 3)), moves, 32, 32)
    )
    every = [2, 2, 3, 0, 4, 4, 4, 4, 4]
    assert found["actions"].tolist() == every[: 4 * step : step]
    drawn = resize(reference(one, times, 64, 64), 32, 32)[0]
    np.testing.assert_array_equal(found["reference"], drawn)


@pytest.mark.parametrize(
    "track, name, content, message",
    [
        ("depth", "x.npy", None, "No such file"),
        ("depth", "../x.npy", None, "inside the folder"),
        ("depth", 3, None, "inside the folder"),
        ("depth", "x.txt", "", r"expected a file \.npy"),
        ("depth", "x.npy", np.zeros((5, 8, 8)), "has 5 entries, and the clip has 9 frames"),
        ("depth", "x.npy", np.full((9, 8, 8), 2.0), r"holds 2 to 2, expected \[0, 1\]"),
        ("depth", "x.npy", np.full((9, 8, 8), np.nan), "not finite"),
        ("depth", "x.npy", np.array([None] * 9), "pickle|object"),
        ("depth", "x.npy", np.zeros((9, 8, 8, 3)), r"expected \[frames h w\]"),
        ("pose", "x.mp4", "no video", "Invalid data"),
        ("reference", "x.png", "no picture", "not an image of the formats"),
        ("flow", "x.npy", np.zeros((9, 8, 8, 3)), r"expected \[frames h w 2\]"),
        ("camera", "x.json", "{}", "x.json: expected .*intrinsics"),
        ("actions", "x.json", '["jump"]', "entry 0: unknown name 'jump'.*Known: stay"),
        ("actions", "x.json", "{}", "expected a list of rows of stay, left"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_bad_record_that_names_it(
    folder, track, name, content, message
):
    path, _ = folder
    for old in path.glob("x.*"):
        old.unlink()
    if isinstance(content, str):
        (path / name).write_text(content)
    elif content is not None:
        np.save(path / name, content, allow_pickle=True)
    record = clip_of(path, **{track: name})
    example(record, (), frames=4)  # a clip whose tracks are not requested can be read
    with pytest.raises(BadRecord, match=f"(?s)a.mp4: not a usable {track} .*{message}"):
        example(record, (track,), frames=4)


def test_tables_agree():
    assert set(TRACKS) | {"motion"} == set(SIGNALS)
    assert len(ACTIONS) == 5 and len(COLOURS) == 8
