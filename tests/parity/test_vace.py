"""Controls of VACE (a video, a mask, references) against WanVACEPipeline of diffusers."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest
from einops import rearrange
from PIL import Image

from vdx.config.build import ConfigError
from vdx.generate import image_inputs, pretrained
from vdx.generate.image_inputs import letterbox, mask_channels
from vdx.generate.pretrained import PretrainedGenerator
from vdx.generate.pretrained_checks import check
from vdx.generate.pretrained_request import complete, remake
from vdx.generate.video_io import frames_at, write_video
from vdx.interop.keymap import WeightsError
from vdx.interop.pretrained import check_consistency, open_pretrained

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tests.wan_pipelines import (  # noqa: E402
    FRAMES,
    HEIGHT,
    VACE,
    VAE,
    WIDTH,
    assembled,
    pipeline,
    scheduler,
    shown,
)

SETTINGS = {
    "prompts": ("a",),
    "mesh": {},
    "steps": 2,
    "num_frames": FRAMES,
    "height": HEIGHT,
    "width": WIDTH,
}
FREE = {name: None for name in ("num_frames", "height", "width")}


@pytest.fixture(scope="module")
def pipe():
    return assembled(VACE, scheduler("unipc"), None, False, VAE)


@pytest.fixture(scope="module")
def model(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("vace")
    pipe.save_pretrained(path)
    return open_pretrained(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """name -> (file or files, what theirs is given instead)."""
    path, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    return {name: shown(name, path, rng) for name in ("control", "control_mask", "reference")}


def once(method):
    """A method that keeps its result for each first argument."""
    kept = {}

    def call(self, name, *args):
        if name not in kept:
            kept[name] = method(self, name, *args)
        return kept[name]

    return call


@pytest.fixture(scope="module")
def control(model, files, mesh):
    """control(names, **change): what our control blocks read [1 t h w c].

    The encoder is read and compiled once.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "compile_call"):
            patch.setattr(PretrainedGenerator, name, once(getattr(PretrainedGenerator, name)))

        def control(names, **change):
            request = complete(model, SETTINGS | {name: files[name][0] for name in names} | change)
            check(request, model, mesh)
            with jax.set_mesh(mesh):
                generator = PretrainedGenerator(model, request, mesh, lambda line: None)
                return generator.control_conditions()["control"]

        yield control


def theirs(pipe, given) -> np.ndarray:
    """What the control blocks of WanVACEPipeline read."""
    with torch.no_grad():
        video, mask, references = pipe.preprocess_conditions(
            given.get("video"),
            given.get("mask"),
            given.get("reference_images"),
            1,
            HEIGHT,
            WIDTH,
            FRAMES,
            torch.float32,
            "cpu",
        )
        latents = pipe.prepare_video_latents(video, mask, references, None, "cpu")
        out = torch.cat([latents, pipe.prepare_masks(mask, references)], 1)
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.fixture(scope="module")
def want(pipe, files):
    """Theirs of every control: 2 references, 3 frames of 4 + 4 latents and 64 of mask."""
    out = theirs(pipe, {k: v for _, given in files.values() for k, v in given.items()})
    assert out.shape == (1, 5, HEIGHT // 8, WIDTH // 8, 72)
    return out


@pytest.mark.parametrize("names", [(), ("control",), ("control", "control_mask"), ("reference",)])
def test_parts_of_it_are_theirs(names, pipe, control, files):
    want = theirs(pipe, {k: v for name in names for k, v in files[name][1].items()})
    np.testing.assert_allclose(control(names), want, atol=1e-5)


def test_all_of_it_is_theirs(control, files, want):
    np.testing.assert_allclose(control(files), want, atol=1e-5)


FAULTS = {
    "mask is black or white": ("mask_channels", lambda f, m, *args: f(np.float32(m > 0.5), *args)),
    "pixels of the mask turned": (
        "mask_channels",
        lambda f, *args: rearrange(f(*args), "t h w (i j) -> t h w (j i)", i=8),
    ),
    "mask of the first frames": (
        "mask_channels",
        lambda f, m, *args: f(m[[0, 0, 1, 1, 1, 5, 5, 5, 5]], *args),
    ),
    "references squeezed": ("letterbox", lambda f, *args: image_inputs.resize_image(*args)),
    "references on black": ("letterbox", lambda f, *args: np.where(f(*args) == 1, -1, f(*args))),
    "references in order": ("reversed", lambda f, paths: paths),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name, control, files, want, monkeypatch):
    where, change = FAULTS[name]
    real = getattr(pretrained, where, reversed)
    monkeypatch.setattr(pretrained, where, functools.partial(change, real), raising=False)
    assert np.abs(control(files) - want).max() > 0.05


@pytest.mark.parametrize("size", [(70, 50), (20, 17), (16, 300), (9, 5), (48, 32)])
def test_a_reference_of_any_size_is_whole_on_white(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 200, (*size[::-1], 3), np.uint8))
    got = letterbox(picture, 32, 48)
    w, h = (max(8, side // 8 * 8) for side in size)
    scale = min(32 / h, 48 / w)
    inner = int(h * scale), int(w * scale)
    with torch.no_grad():
        small = torch.from_numpy(image_inputs.resize_image(picture, h, w)).movedim(-1, 0)[None]
        want = torch.nn.functional.interpolate(small, inner, mode="bilinear", align_corners=False)
    top, left = (32 - inner[0]) // 2, (48 - inner[1]) // 2
    spot = slice(top, top + inner[0]), slice(left, left + inner[1])
    np.testing.assert_allclose(got[spot], want[0].movedim(0, -1), atol=1e-5)
    got[spot] = 1
    assert got.shape == (32, 48, 3) and got.dtype == np.float32 and (got == 1).all()


@pytest.mark.parametrize("t", [1, 5, 9, 17, 81])
def test_a_mask_in_time_is_that_of_torch(t):
    mask = np.random.default_rng(0).random((t, 16, 24), np.float32)
    got = mask_channels(mask, (t - 1) // 4 + 1, 8)
    rows = torch.from_numpy(rearrange(mask, "t (h i) (w j) -> (i j) t h w", i=8, j=8))[None]
    want = torch.nn.functional.interpolate(rows, ((t - 1) // 4 + 1, 2, 3), mode="nearest-exact")
    np.testing.assert_array_equal(got, want[0].movedim(0, -1).numpy())


def numbered(path, count: int, fps: float, size=(32, 48)) -> str:
    """A video whose frame i is grey, 8 i."""
    frames = np.broadcast_to(
        8 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, *size, 3)
    )
    write_video(path, frames, fps)
    return str(path)


def numbers(frames) -> list[int]:
    return [round(float(np.mean(frame)) / 8) for frame in frames]


@pytest.mark.parametrize(
    ("fps", "want"),
    [
        (16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (17, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (8, [0, 2, 4, 6, 8]),
        (24, [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8]),
        (10, [0, 2, 3, 5, 6, 8]),
        (0.5, [0]),
    ],
)
def test_frames_are_those_nearest_in_time(fps, want, tmp_path):
    file = numbered(tmp_path / "a.mp4", 9, 16)
    assert numbers(frames_at(file, fps)) == want
    assert numbers(itertools.islice(frames_at(file, fps), 3)) == want[:3]
    with pytest.raises(ValueError, match=r"b\.mp4 is not a readable video"):
        next(frames_at(tmp_path / "b.mp4", fps))


def test_a_picture_as_a_mask_masks_every_frame(control, tmp_path):
    grey = np.zeros((HEIGHT, WIDTH), np.uint8)
    grey[8:20, 16:40] = 255
    Image.fromarray(grey).save(tmp_path / "mask.png")
    got = control(("control",), control_mask=str(tmp_path / "mask.png"))
    want = mask_channels(np.repeat(grey[None] / np.float32(255), FRAMES, 0), 3, 8)
    np.testing.assert_allclose(got[0, ..., 8:], want, atol=1e-6)


def test_size_and_length_are_those_of_the_control(model, tmp_path):
    control = numbered(tmp_path / "a.mp4", 30, 30, (128, 192))  # 1 s

    def defaults(**given):
        r = complete(model, SETTINGS | FREE | given)
        return r.height, r.width, r.num_frames, r.guidance

    assert defaults(control=control) == (512, 768, 13, (5.0,))  # 16 of them at 16 fps
    assert defaults(control=control, fps=30.0)[2] == 29
    assert defaults(control=control, num_frames=5, height=32, width=48)[:3] == (32, 48, 5)
    assert defaults()[:3] == (480, 832, 81)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"control": "short"},
            r"short.mp4 shows 7 frames at fps = 16.0; num_frames = 9 is more: "
            "take 5",
        ),
        ({"control_mask": "short"}, "--control_mask=.* shows 7 frames"),
        ({"control": None}, "a control_mask needs a control"),
        (
            {"control": "text"},
            r"--control=.*text.mp4: .*text.mp4 is not a readable video: Invalid data",
        ),
        (
            {"control_mask": "picture"},
            r"--control_mask=.*x.png: not an image of the formats .*PNG.*, or damaged",
        ),
        ({"reference": ("picture",)}, r"--reference=.*x.png is not an image"),
        ({"reference": ("absent",)}, r"--reference 0=.*y.png cannot be read: No such file"),
        ({"image": "mask"}, "reads a control and references"),
    ],
)
def test_what_cannot_be_read_is_explained(change, message, model, files, mesh, tmp_path):
    (tmp_path / "text.mp4").write_bytes(b"text")
    (tmp_path / "x.png").write_bytes(b"text")
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    paths = {
        "short": numbered(tmp_path / "short.mp4", 7, 16),
        "absent": str(tmp_path / "y.png"),
        "text": str(tmp_path / "text.mp4"),
        "picture": str(tmp_path / "x.png"),
        "mask": str(tmp_path / "mask.png"),
    }
    asked = {"control": files["control"][0], "control_mask": str(tmp_path / "mask.png")}
    change = {
        k: tuple(map(paths.get, v)) if isinstance(v, tuple) else paths.get(v)
        for k, v in change.items()
    }
    with pytest.raises(ConfigError, match=message):
        check(complete(model, SETTINGS | asked | change), model, mesh)


def test_another_model_reads_no_control(tmp_path, files, mesh):
    pipeline("t2v").save_pretrained(tmp_path)
    model = open_pretrained(tmp_path)
    for name, (file, _) in files.items():
        with pytest.raises(ConfigError, match="this model has no control blocks"):
            check(complete(model, SETTINGS | {name: file}), model, mesh)


def test_a_manifest_identifies_its_files(model, files, mesh):
    request = complete(model, SETTINGS | {name: file for name, (file, _) in files.items()})
    made = json.loads(json.dumps(dataclasses.asdict(request)))
    assert set(made["digests"]) == {"control", "control_mask", "reference 0", "reference 1"}
    assert remake(made, {}) == request
    swapped = remake(made, {"reference": request.references[::-1]})
    with pytest.raises(
        ConfigError,
        match=r"reference 0 = .* is not the file of the request; give "
        "the right one by --reference",
    ):
        check(swapped, model, mesh)


def test_control_blocks_that_read_something_else(model):
    part = model.components["transformer"]
    module = part.module.clone(signals={**part.module.signals, "control": {"channels": 70}})
    other = {**model.components, "transformer": dataclasses.replace(part, module=module)}
    with pytest.raises(WeightsError, match="the control blocks read 70 channels, not 72"):
        check_consistency(dataclasses.replace(model, components=other))
