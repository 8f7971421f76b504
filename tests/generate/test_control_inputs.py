"""Controls of a request: files become entries of a batch, and reach the clip."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.micro_run import MICRO, ROOT, command
from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.camera import plucker, write_camera
from vdx.experiment import Experiment
from vdx.files import read_json
from vdx.generate.control_inputs import read_controls
from vdx.generate.generator import Generator, Sampling
from vdx.generate.video_io import write_video

SHAPE, FPS = (8, 32, 32, 3), 8.0
RNG = np.random.default_rng(0)
ALL = ("text", "known_frames", "reference", "depth", "pose", "flow", "camera", "actions", "motion")
ACTIONS = "right,right,up,up,stay,left,left,down"


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    """{flag of vdx.sample: its value}, with a file for every control."""
    place = tmp_path_factory.mktemp("controls")
    for name in ("image", "last_image", "reference"):
        Image.fromarray(RNG.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{name}.png")
    np.save(place / "depth.npy", RNG.random((8, 32, 32), np.float32))
    np.save(place / "flow.npy", RNG.normal(size=(8, 32, 32, 2)).astype(np.float32))
    write_video(place / "pose.mp4", np.full((8, 32, 32, 3), 200, np.uint8), FPS)
    matrices = np.tile(np.diag([1.0, 1.0, 1.0]), (8, 1, 1))
    matrices[:, :2, 2] = 0.5
    moves = np.tile(np.eye(3, 4), (8, 1, 1))
    moves[:, 0, 3] = np.linspace(0, 0.2, 8)
    write_camera(place / "camera.json", matrices, moves)
    files = {
        name: str(place / name)
        for name in (
            "image.png",
            "last_image.png",
            "reference.png",
            "depth.npy",
            "flow.npy",
            "pose.mp4",
            "camera.json",
        )
    }
    return {name.split(".")[0]: path for name, path in files.items()} | {
        "actions": ACTIONS,
        "motion": 3.5,
    }


def test_files_become_what_training_reads(controls):
    got = read_controls(controls, ALL, SHAPE, FPS, mean=-0.5, flow_points=0)
    assert {k: v.shape for k, v in got.items()} == {
        "known": (1, *SHAPE),
        "known_mask": (1, 8),
        "reference": (1, 32, 32, 3),
        "depth": (1, 8, 32, 32, 1),
        "pose": (1, 8, 32, 32, 3),
        "flow": (1, 8, 32, 32, 3),
        "camera": (1, 8, 32, 32, 6),
        "actions": (1, 8),
        "motion": (1,),
    }
    first = np.asarray(Image.open(controls["image"]), np.float32) / 127.5 - 1 + 0.5
    np.testing.assert_allclose(got["known"][0, 0], first, atol=1e-6)
    np.testing.assert_array_equal(got["known_mask"], [[1, 0, 0, 0, 0, 0, 0, 1]])
    assert not got["known"][0, 1:-1].any() and got["known"][0, -1].any()
    np.testing.assert_array_equal(got["depth"][0, ..., 0], np.load(controls["depth"]))
    np.testing.assert_array_equal(got["flow"][0, :-1, ..., :2], np.load(controls["flow"])[:-1])
    assert got["flow"][0, :-1, ..., 2].all() and not got["flow"][0, -1].any()
    np.testing.assert_allclose(got["pose"], 200 / 255, atol=0.02)
    np.testing.assert_array_equal(got["actions"], [[2, 2, 3, 3, 0, 1, 1, 4]])
    moves = np.tile(np.eye(3, 4), (8, 1, 1))
    moves[:, 0, 3] = np.linspace(0, 0.2, 8)
    matrix = np.tile(np.array([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]), (8, 1, 1))
    np.testing.assert_allclose(got["camera"][0], plucker(matrix, moves, 32, 32), atol=1e-6)


def test_sparse_flow_has_a_few_points(controls):
    got = read_controls({"flow": controls["flow"]}, ALL, SHAPE, FPS, 0.0, flow_points=5)["flow"]
    assert 0 < got[0, 0, ..., 2].sum() <= 5 and not got[got[..., 2] == 0].any()


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        ({"depth": "no.npy"}, SHAPE, r"--depth=no\.npy"),
        ({"image": "no.png"}, SHAPE, r"--image=no\.png is not an image"),
        ({"image": "{image}"}, (8, 4, 4, 16), r"--image: this model draws latents of 16 channels"),
        ({"depth": "{depth}"}, (16, 32, 32, 3), r"depth\.npy.*has 8 entries, and the clip has 16"),
        ({"pose": "{pose}"}, (16, 32, 32, 3), r"pose\.mp4 has 1 s, and the clip 2 s"),
        ({"camera": "{camera}"}, (4, 32, 32, 3), r"camera\.json.*8 cameras, and the clip has 4"),
        ({"actions": "right,up"}, SHAPE, r"--actions names 2; the clip has 8 frames"),
        ({"actions": "right,dwn"}, SHAPE, r"unknown name 'dwn'.*Did you mean 'down'"),
        ({"flow": "{depth}"}, SHAPE, r"depth\.npy.*holds \[8, 32, 32\], expected"),
    ],
)
def test_what_cannot_be_read_is_named(controls, given, shape, message):
    with pytest.raises(ConfigError, match=message):
        read_controls({k: v.format(**controls) for k, v in given.items()}, ALL, shape, FPS, 0.0, 0)


def test_what_a_model_was_not_trained_with(controls):
    for name in controls:
        with pytest.raises(ConfigError, match=f"--{name}: .*not trained with.*it reads: text, fps"):
            read_controls({name: controls[name]}, ("text", "fps"), SHAPE, FPS, 0.0, 0)


def test_signals_that_a_generator_does_not_read_are_refused():
    made = Experiment(resolve(str(ROOT / "configs" / "control_tiny.py:depth"), MICRO))
    with pytest.raises(ConfigError, match=r"config.sample.signal_guidance: unknown name 'flow'"):
        made.generator(Sampling(signal_guidance={"flow": 2.0}))
    generator: Generator = made.generator()
    with pytest.raises(ConfigError, match="signals: unknown name 'flow'"):
        generator({}, ["a"], [0], num_frames=8, fps=8.0, controls={"flow": np.zeros(1)})


def test_a_first_frame_at_time_zero_is_clamped(controls, randomise):
    """A model that was trained with `first_frame` begins with the picture, and continues it."""
    made = Experiment(
        resolve(
            str(ROOT / "configs" / "t2v_tiny.py"),
            [
                *MICRO,
                "--config.first_frame=0.5",
                "--config.model.backbone.patch=(1,8,8)",
                "--config.model.backbone.depth=1",
                "--config.data.mean=-0.5",
            ],
        )
    )
    params, generator = randomise(made.shapes), made.generator()
    entries = read_controls(
        {"image": controls["image"]}, made.model.signals, SHAPE, FPS, -0.5, 0, first_frame=True
    )
    draw = lambda entries: generator(params, ["a"], [0], num_frames=8, fps=FPS, controls=entries)
    other = draw({name: -value for name, value in entries.items()})
    got = draw(entries)
    first = np.asarray(Image.open(controls["image"]), np.float32) / 127.5 - 1
    np.testing.assert_allclose(got[0, 0], first, atol=1e-6)
    assert np.abs(got[0, 1:] - other[0, 1:]).max() > 1e-3
    with pytest.raises(ConfigError, match="a token of this model is 8 frames long"):
        Experiment(resolve(str(ROOT / "configs" / "t2v_tiny.py"), ["--config.first_frame=0.5"]))


@pytest.mark.slow
def test_every_control_reaches_the_clip(controls, tmp_path):
    """A model of all signals, from its config through training to vdx.sample and its manifest."""
    out = tmp_path / "run"
    signals = {
        "known_frames": {},
        "reference": {"encoder": {"name": "patches"}},
        "pose": {},
        "flow": {},
        "camera": {"port": "control"},
        "actions": {},
        "motion": {},
    }
    command(
        "vdx.main",
        "--config=configs/control_tiny.py:depth",
        f"--workdir={out}",
        *MICRO,
        "--config.data.source.motions=('steered',)",
        "--config.eval={'loss': None}",
        "--config.train.sample_prompts=('a red circle is steered',)",
        *(f"--config.model.signals.{k}={v}" for k, v in signals.items()),
    )

    def sample(name, *flags):
        array = tmp_path / f"{name}.npy"
        command(
            "vdx.sample",
            f"--workdir={out}",
            f"--out={tmp_path / name}.mp4",
            *flags,
            "--averaged=false",
            f"--save_array={array}",
        )
        return np.load(array)

    flags = {k: f"--{k}={v}" for k, v in controls.items() if k not in ("depth", "pose")}
    maps = f"--control=depth={controls['depth']},pose={controls['pose']}"
    prompt = "--prompt=a red circle is steered"
    plain = sample("plain", prompt)
    both = sample("all", prompt, *flags.values(), maps, "--signal_guidance=depth=2,flow=3")
    assert np.abs(both - plain).max() > 1e-3
    again = tmp_path / "again.npy"
    command(
        "vdx.sample",
        f"--workdir={out}",
        f"--from_manifest={tmp_path / 'all.json'}",
        f"--out={tmp_path / 'b.mp4'}",
        f"--save_array={again}",
    )
    np.testing.assert_array_equal(np.load(again), both)
    for name in ("image", "camera", "actions"):  # others by their entries, above
        assert np.abs(sample(name, prompt, flags[name]) - plain).max() > 1e-4, name
    request = read_json(tmp_path / "all.json")["request"]
    assert set(request["digests"]) == set(controls) - {"actions", "motion"}
    json.dumps(request)
    np.save(controls["depth"], np.zeros((8, 32, 32), np.float32))
    done = command(
        "vdx.sample",
        f"--workdir={out}",
        f"--from_manifest={tmp_path / 'all.json'}",
        f"--out={tmp_path / 'c.mp4'}",
        check=False,
    )
    assert done.returncode and "is not the file of the request" in done.stderr
    done = command(
        "vdx.sample",
        f"--workdir={out}",
        prompt,
        "--control=deph=x.npy",
        f"--out={tmp_path / 'd.mp4'}",
        check=False,
    )
    assert done.returncode and "--control=deph=x.npy is not like depth=FILE" in done.stderr
