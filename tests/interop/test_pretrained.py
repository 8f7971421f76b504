"""Folders of pretrained models: opened, refused, checked against requests, converted and back."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vdx.config.build import ConfigError
from vdx.convert import open_source
from vdx.files import read_json, write_json
from vdx.generate.preprocess import CHOICES, floored_size, rounded_size
from vdx.generate.pretrained_checks import check
from vdx.generate.pretrained_request import complete
from vdx.interop.family_defaults import NEGATIVE, family_defaults
from vdx.interop.keymap import WeightsError
from vdx.interop.pretrained import open_pretrained
from vdx.interop.safetensors import read_header, write
from vdx.interop.stored_array import StoredArray

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
import diffusers  # noqa: E402

from tests.parity.test_wan import original_names  # noqa: E402
from tests.wan_pipelines import CLIP, NETWORK, pipeline, randomised  # noqa: E402

SETTINGS = {"prompts": ("a cat",), "num_frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """kind -> its folder, which no test changes."""

    @functools.cache
    def save(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind.replace(" ", "_")) / "model"
        pipeline(kind).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="module")
def opened(folder):
    return functools.cache(lambda kind: open_pretrained(folder(kind)))


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of a kind's folder, to be spoilt."""

    def make(kind: str) -> Path:
        return Path(shutil.copytree(folder(kind), tmp_path / "copy"))

    return make


@pytest.fixture(autouse=True)
def without_accelerate(monkeypatch):
    """With this list diffusers wants `accelerate`, to read in another type than the file's."""
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (160, 90)).save(path)
    return str(path)


def edit(path: Path, **changes) -> None:
    write_json(path, read_json(path) | changes)


def spoilt(path: Path, name: str) -> None:
    if name == "no folder":
        shutil.rmtree(path)
    elif name == "no index":
        (path / "model_index.json").unlink()
    elif name == "another pipeline":
        edit(path / "model_index.json", _class_name="WanAnimatePipeline")
    elif name == "no control":
        edit(path / "model_index.json", _class_name="WanVACEPipeline")
    elif name == "parts missing":
        shutil.rmtree(path / "vae")
        shutil.rmtree(path / "tokenizer")
    elif name == "a file cut off":
        file = path / "transformer" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif name == "one expert":
        edit(path / "model_index.json", boundary_ratio=None)
    elif name == "another vae":
        edit(path / "vae" / "config.json", z_dim=5, latents_mean=[0] * 5, latents_std=[1] * 5)
    elif name == "another text encoder":
        edit(path / "text_encoder" / "config.json", d_model=24)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no folder", "is not a folder: give the folder of a model as diffusers saves it"),
        ("no index", r"has no model_index.json.*vdx.convert.*There are: scheduler, text_encoder"),
        (
            "another pipeline",
            "is a WanAnimatePipeline; vdx generates with WanPipeline, WanImageToVideo",
        ),
        ("no control", "control blocks in the transformer go with a WanVACEPipeline"),
        ("parts missing", r"(?s)lacks folders that a WanPipeline needs.*\n  vae\n  tokenizer$"),
        ("a file cut off", r"transformer/.*safetensors is cut off.*Download it again"),
        ("one expert", "boundary_ratio = None goes with a transformer_2"),
        ("another vae", "the transformer predicts 4 channels, the VAE has 5"),
        ("another text encoder", "the transformer reads features of another text_encoder"),
    ],
)
def test_what_is_no_model_is_explained(name, message, copy):
    path = copy("a14b t2v")
    spoilt(path, name)
    with pytest.raises(WeightsError, match=message):
        open_pretrained(path)


def test_files_of_another_network_are_named_before_anything_is_read(copy, mesh, monkeypatch):
    path = copy("t2v")
    model = randomised(diffusers.WanTransformer3DModel(**NETWORK | {"num_layers": 1}), 0)
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    del arrays["blocks.0.attn2.to_q.weight"]
    write(
        path / "transformer" / "diffusion_pytorch_model.safetensors",
        {k: (v.shape, v.dtype) for k, v in arrays.items()},
        arrays.items(),
    )
    edit(path / "transformer" / "config.json", num_layers=1)
    monkeypatch.setattr(StoredArray, "read", lambda self: pytest.fail("read"))
    with pytest.raises(WeightsError, match=r"(?s)copy/transformer: .*cross/q/kernel.*not in the"):
        open_pretrained(path).check(mesh)


def test_an_image_processor_that_does_something_else(copy):
    path = copy("i2v")
    open_pretrained(path)
    edit(path / "image_processor" / "preprocessor_config.json", size=28, crop_size=28)
    open_pretrained(path)
    edit(
        path / "image_processor" / "preprocessor_config.json",
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
    )
    with pytest.raises(WeightsError, match=r"(?s)do_center_crop = False, not True.*image_mean"):
        open_pretrained(path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("t2v", {"num_frames": 8}, r"num_frames = 8 is not 1 \+ 4n: take 5 or 9"),
        ("t2v", {"num_frames": 11}, "take 9 or 13"),
        (
            "t2v",
            {"height": 40, "width": 8},
            r"(?s)height = 40 is not a multiple of 16: take 32 or 48.*width = 8 .*take 16 or 16",
        ),
        ("5b", {"height": 48}, "height = 48 is not a multiple of 32: take 32 or 64"),
        ("t2v", {"image": "PICTURE"}, "this model reads text alone"),
        ("i2v", {}, "this model begins with an image: give an image"),
        ("i2v", {"image": "PICTURE", "last_image": "PICTURE"}, "reads a first one alone"),
        ("flf2v", {"image": "PICTURE"}, "also ends with an image: give a last_image"),
        ("a14b i2v", {"last_image": "PICTURE"}, "a last_image needs an image"),
        (
            "a14b i2v",
            {"image": "PICTURE", "last_image": "PICTURE", "num_frames": 1},
            "a last_image needs num_frames of at least 5",
        ),
        ("t2v", {"guidance": (4.0, 3.0)}, r"guidance = \(4.0, 3.0\): this model has 1 transformer"),
        (
            "t2v",
            {"init_noise": "NOISE"},
            r"float32 \(1, 3, 4, 5, 4\); this needs float32 \(1, 3, 4, 6, 4\) \[b t h w c\]",
        ),
        ("t2v", {"init_noise": "PICTURE"}, "is not a .npy file"),
        (
            "t2v",
            {"init_noise": "/nowhere.npy"},
            "--init_noise=/nowhere.npy cannot be read: No such",
        ),
        ("i2v", {"image": "NOISE"}, r"--image=.*is not an image that can be read"),
        ("t2v", {"sampler": "unipcc"}, "unknown name 'unipcc'. Did you mean 'unipc'"),
        ("t2v", {"timesteps": "diffusers_unpc"}, "Did you mean 'diffusers_unipc'"),
    ],
)
def test_what_a_model_cannot_draw_is_explained(
    kind, change, message, opened, picture, tmp_path, mesh
):
    np.save(tmp_path / "noise.npy", np.zeros((1, 3, 4, 5, 4), np.float32))
    files = {"PICTURE": picture, "NOISE": str(tmp_path / "noise.npy")}
    change = {k: files.get(v, v) if isinstance(v, str) else v for k, v in change.items()}
    model = opened(kind)
    with pytest.raises(ConfigError, match=message):
        check(complete(model, {**SETTINGS, "mesh": {}} | change), model, mesh)


def test_a_picture_that_changed_is_not_that_of_the_manifest(opened, picture, mesh):
    model = opened("i2v")
    request = complete(model, {**SETTINGS, "mesh": {}, "image": picture})
    check(request, model, mesh)
    Image.new("RGB", (160, 91)).save(picture)
    with pytest.raises(ConfigError, match="is not the file of the request; give the right one by"):
        check(request, model, mesh)


def test_defaults_are_the_folders_and_the_makers(opened, copy, picture):
    def defaults(kind, **given):
        request = complete(opened(kind), {"prompts": ("a",), "mesh": {}, **given})
        sampling = [request.sampling[k] for k in ("sampler", "timesteps", "steps", "shift")]
        return (*sampling, request.guidance, request.fps, request.num_frames)

    assert defaults("t2v") == ("unipc", "diffusers_unipc", 50, 3.0, (5.0,), 16.0, 81)
    assert defaults("t2v euler")[:2] == ("euler", "diffusers_euler")
    assert defaults("i2v", image=picture)[2] == 40 and defaults("flf2v", image=picture)[2] == 50
    assert defaults("a14b t2v")[2:5] == (40, 3.0, (4.0, 3.0))
    assert defaults("a14b i2v", image=picture)[4] == (3.5, 3.5)
    assert defaults("5b")[2:] == (50, 3.0, (5.0,), 24.0, 121)
    model = opened("5b")
    assert (family_defaults(model).height, family_defaults(model).width) == (704, 1280)
    assert complete(model, {"prompts": ("a",), "mesh": {}}).negative_prompt == ""

    path = copy("t2v")
    edit(path / "scheduler" / "scheduler_config.json", solver_order=3, use_karras_sigmas=True)
    with pytest.raises(WeightsError, match=r"(?s)solver_order = 3, not 2.*use_karras_sigmas"):
        complete(open_pretrained(path), {"prompts": ("a",), "mesh": {}})
    complete(
        open_pretrained(path),
        {"prompts": ("a",), "mesh": {}, "sampler": "euler", "timesteps": "plain", "shift": 5.0},
    )
    edit(path / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    with pytest.raises(WeightsError, match="is LCMScheduler; known are UniPCMultistepScheduler"):
        complete(open_pretrained(path), {"prompts": ("a",), "mesh": {}})


def official(model, **scheduler):
    """The same model as vdx.convert leaves it, from the makers' own folder."""
    return dataclasses.replace(
        model,
        index={**model.index, "_defaults": "official"},
        scheduler={**model.scheduler, **scheduler},
    )


def test_a_folder_of_the_makers_has_their_defaults(opened, picture, monkeypatch):
    def defaults(kind, **given):
        request = complete(official(opened(kind)), {"prompts": ("a",), "mesh": {}, **given})
        return request, request.sampling["shift"]

    # Here every scheduler has shift 3. Times are the makers', the negative prompt too.
    request, shift = defaults("t2v")
    assert request.sampling["timesteps"] == "wan_unipc" and shift == 3.0
    assert (request.guidance, request.negative_prompt) == ((5.0,), NEGATIVE)
    assert defaults("t2v", negative_prompt="")[0].negative_prompt == ""
    assert defaults("t2v", timesteps="plain")[0].sampling["timesteps"] == "plain"
    assert defaults("t2v euler")[0].sampling["timesteps"] == "diffusers_euler"
    with monkeypatch.context() as patch:  # the width of 1.3B
        patch.setattr("vdx.interop.family_defaults.WIDTH_1P3B", 48)
        assert defaults("t2v")[0].guidance == (6.0,)

    request, _ = defaults("i2v", image=picture)
    assert request.negative_prompt == "镜头晃动，" + NEGATIVE
    assert request.preprocess == "official"


def test_the_shift_of_image_to_video_depends_on_the_size(opened, picture):
    model = official(opened("i2v"), flow_shift=5.0)
    for given, shift in (
        ({}, 3.0),
        ({"height": 480, "width": 832}, 3.0),
        ({"height": 720, "width": 1280}, 5.0),
        ({"shift": 7.0}, 7.0),
    ):
        fields = {"prompts": ("a",), "mesh": {}, "image": picture, **given}
        assert complete(model, fields).sampling["shift"] == shift


def test_the_makers_negative_prompt_is_named_by_a_word(opened, picture):
    request = complete(opened("t2v"), {"prompts": ("a",), "mesh": {}, "negative_prompt": "default"})
    assert request.negative_prompt == NEGATIVE


def test_how_images_are_prepared(opened, picture, tmp_path, mesh):
    given = {"prompts": ("a",), "mesh": {}, "image": picture}
    model = opened("i2v")
    assert complete(model, given).preprocess == "diffusers"
    sizes = [
        (r.height, r.width)
        for r in (complete(model, given | {"preprocess": name}) for name in CHOICES)
    ]
    with Image.open(picture) as image:
        width, height = image.size
    assert sizes == [
        floored_size(480 * 832, 16, width, height),
        rounded_size(480 * 832, 16, width, height),
    ]
    with pytest.raises(ConfigError, match=r"preprocess = 'other': expected one of official"):
        complete(model, given | {"preprocess": "other"})
    with pytest.raises(ConfigError, match="it prepares the first image of a clip, and none is"):
        complete(opened("t2v"), {"prompts": ("a",), "mesh": {}, "preprocess": "official"})

    # Two images of different sizes.
    other = str(tmp_path / "other.png")
    Image.new("RGB", (30, 50)).save(other)
    both = {**SETTINGS, "mesh": {}, "image": picture, "last_image": other}
    request = complete(opened("flf2v"), both | {"preprocess": "official"})
    with pytest.raises(ConfigError, match="is meant for two images of one size"):
        check(request, opened("flf2v"), mesh)
    check(complete(opened("flf2v"), both), opened("flf2v"), mesh)


def test_a_frame_has_the_pictures_proportions():
    assert rounded_size(480 * 832, 16, 1920, 1080) == (464, 832)
    assert rounded_size(480 * 832, 16, 1080, 1920) == (832, 464)
    assert rounded_size(704 * 1280, 32, 500, 500) == (928, 928)


def test_weights_are_known_again(opened, copy):
    known = opened("t2v").identity()
    path = copy("t2v")
    assert open_pretrained(path).identity() == known
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = {k: s.read().copy() for k, s in read_header(file).items()}
    arrays["decoder.conv_in.weight"] *= 1.001
    write(file, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.items())
    assert open_pretrained(path).identity() != known


# Conversion.


def everything(path: Path) -> dict[str, np.ndarray]:
    """Every array in the files of a model, by folder and key."""
    return {
        f"{file.parent.name}/{key.removeprefix('vision_model.')}": stored.read()
        for file in path.rglob("*.safetensors")
        for key, stored in read_header(file).items()
    }


def same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype and got[key].tobytes() == value.tobytes(), key


def params(path: Path, mesh) -> dict:
    return {name: part.load(mesh) for name, part in open_pretrained(path).components.items()}


@pytest.mark.parametrize("kind", ["flf2v", pytest.param("5b", marks=pytest.mark.slow)])
def test_to_vdx_and_back_is_every_bit(kind, folder, tmp_path, mesh):
    own, back = tmp_path / "own", tmp_path / "back"
    open_source(folder(kind), {}).save(own, own=True)
    assert all("/" in key.split("/", 1)[1] or "table" in key for key in everything(own))
    jax.tree.map(np.testing.assert_array_equal, params(own, mesh), params(folder(kind), mesh))
    open_source(own, {}).save(back, own=False)
    same(everything(back), everything(folder(kind)))
    for path in (own, back):
        assert read_json(path / "model_index.json") == read_json(folder(kind) / "model_index.json")
    again = type(pipeline(kind)).from_pretrained(back)
    assert again.config.boundary_ratio == pipeline(kind).config.boundary_ratio
    for name in ("transformer", "vae", "text_encoder"):
        want = getattr(pipeline(kind), name).state_dict()
        got = getattr(again, name).state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_types_are_kept(folder, copy, tmp_path):
    path = copy("t2v")
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    arrays = {
        k: s.read().astype("bfloat16" if k.endswith("to_q.weight") else "float16")
        for k, s in read_header(file).items()
    }
    write(file, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.items())
    open_source(path, {}).save(tmp_path / "own", own=True)
    open_source(tmp_path / "own", {}).save(tmp_path / "back", own=False)
    same(everything(tmp_path / "back"), everything(path))


def test_a_conversion_that_cannot_be(folder):
    with pytest.raises(WeightsError, match="is a whole model; --vae cannot be given besides"):
        open_source(folder("t2v"), {"vae": "x"})


def test_one_file_and_parts_that_are_given(folder, tmp_path):
    """A transformer of pictures as ComfyUI keeps it, the rest from elsewhere."""
    network = CLIP | {"attention_head_dim": 128, "num_attention_heads": 1, "added_kv_proj_dim": 128}
    model = randomised(diffusers.WanTransformer3DModel(**network), 0)
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    named = {f"model.diffusion_model.{old}": arrays[k] for k, old in original_names(arrays).items()}
    file, parts = tmp_path / "wan.safetensors", folder("i2v")
    write(file, {k: (v.shape, v.dtype) for k, v in named.items()}, named.items())
    given = {part: str(parts / part) for part in ("text_encoder", "tokenizer", "vae")}
    with pytest.raises(WeightsError, match="features of an image_encoder of another width or none"):
        open_source(file, given)
    given["image_encoder"] = str(parts / "image_encoder")
    open_source(file, given).save(tmp_path / "out", own=False)
    again = diffusers.WanImageToVideoPipeline.from_pretrained(tmp_path / "out")
    got, want = again.transformer.state_dict(), model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert again.scheduler.config.flow_shift == 5.0
    theirs = pipeline("i2v").image_processor
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    np.testing.assert_allclose(
        *(
            p(images=picture, return_tensors="np")["pixel_values"]
            for p in (again.image_processor, theirs)
        ),
        atol=1e-6,
    )
