"""Clips from pretrained weights against the pipelines of diffusers, through their own folders."""

import functools
import hashlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vdx.config.build import ConfigError
from vdx.files import read_json
from vdx.generate import generator as generator_module
from vdx.generate import pretrained
from vdx.generate.manifest import PretrainedWeights, check_weights
from vdx.generate.pretrained import PretrainedGenerator
from vdx.generate.pretrained_checks import check
from vdx.generate.pretrained_request import complete
from vdx.generate.video_io import to_uint8
from vdx.interop.components import Component
from vdx.interop.keymap import WeightsError
from vdx.interop.pretrained import open_pretrained
from vdx.parallel import MeshSpec

pytest.importorskip("torch")
pytest.importorskip("diffusers")
from tests.micro_run import command
from tests.wan_pipelines import KINDS, PROMPT, Case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return functools.cache(lambda kind: Case(kind, tmp_path_factory.mktemp(kind.replace(" ", "_"))))


@pytest.fixture(scope="module", autouse=True)
def every_program_is_kept():
    """Encoders and decoders are the same programs in many tests."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    yield
    jax.config.update(name, before)


@pytest.fixture
def draw():
    mesh = MeshSpec().make(jax.devices()[:1])

    def draw(folder, settings, mesh=mesh):
        model = open_pretrained(folder, settings.get("dtype", "float32"))
        request = complete(model, settings)
        check(request, model, mesh)
        model.check(mesh)
        return PretrainedGenerator(model, request, mesh)()

    return draw


def far(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """(mean, largest) difference of the pixels, of 255."""
    assert got.shape == want.shape and got.dtype == np.float32
    difference = np.abs(got - want) * 127.5
    return float(difference.mean()), float(difference.max())


DEFAULT = ("t2v", "i2v", "5b image")


def marked(name: str, kind: str):
    """By default one of each way in. What VACE's control blocks read is in test_vace.py."""
    return pytest.param(name, marks=[] if kind in DEFAULT else [pytest.mark.slow])


@pytest.mark.parametrize("kind", [marked(kind, kind) for kind in KINDS])
def test_clips_are_those_of_diffusers(kind, case, draw):
    c = case(kind)
    assert close(draw(c.folder, c.settings()), c.want)


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """Well within half a level of 255 on average and three at most, which are promised."""
    mean, most = far(got, want)
    return mean < 0.01 and most < 0.1


def reversed_channels(monkeypatch):
    mask = pretrained.given_mask
    monkeypatch.setattr(pretrained, "given_mask", lambda *args: mask(*args)[..., ::-1])


def mask_last(monkeypatch):
    conditions = PretrainedGenerator.image_conditions
    monkeypatch.setattr(
        PretrainedGenerator,
        "image_conditions",
        lambda self: {
            k: np.roll(v, -4, -1) if k == "concat" else v for k, v in conditions(self).items()
        },
    )


def tokens_swapped(monkeypatch):
    tokens = PretrainedGenerator.image_tokens
    monkeypatch.setattr(
        PretrainedGenerator, "image_tokens", lambda self, pictures: tokens(self, pictures[::-1])
    )


def references_at_the_end(monkeypatch):
    control = PretrainedGenerator.control_conditions
    monkeypatch.setattr(
        PretrainedGenerator,
        "control_conditions",
        lambda self: {k: np.roll(v, -2, 1) for k, v in control(self).items()},
    )


def known_frame_at_time_t(monkeypatch):
    clamp_known_frames = generator_module.clamp_known_frames

    def clamp(denoise, known, is_generated):
        return clamp_known_frames(
            lambda x, t: denoise(x, jnp.broadcast_to(t.max(1, keepdims=True), t.shape)),
            known,
            is_generated,
        )

    monkeypatch.setattr(generator_module, "clamp_known_frames", clamp)


MUTATIONS: dict[str, tuple[str, dict, Any]] = {
    "another grid": ("t2v", {"timesteps": "wan_unipc"}, None),
    "another shift": ("t2v euler", {"shift": 3.2}, None),
    "no negative prompt": ("t2v euler", {"negative_prompt": ""}, None),
    "guidance swapped": ("a14b t2v", {"guidance": (2.0, 6.0)}, None),
    "mask in reverse": ("a14b i2v", {}, reversed_channels),
    "mask after latents": ("i2v", {}, mask_last),
    "pictures swapped": ("flf2v", {}, tokens_swapped),
    "known frame at time t": ("5b image", {}, known_frame_at_time_t),
    "no mask": ("vace", {"control_mask": None}, None),
    "references at the end": ("vace", {}, references_at_the_end),
}


@pytest.mark.parametrize("name", [marked(name, kind) for name, (kind, *_) in MUTATIONS.items()])
def test_what_would_be_wrong_is_seen(name, case, draw, monkeypatch):
    kind, change, mutate = MUTATIONS[name]
    if mutate:
        mutate(monkeypatch)
    c = case(kind)
    wrong = far(draw(c.folder, c.settings() | change), c.want)
    assert wrong[0] > 0.5 or wrong[1] > 3


def write_lora_file(weights: dict, path) -> dict:
    """A LoRA of some layers of a transformer in diffusers' layout; {key: B A} of it."""
    rng, arrays, changes = np.random.default_rng(5), {}, {}
    for layer in ("blocks.0.attn1.to_q", "blocks.1.attn2.to_v", "blocks.1.ffn.net.0.proj"):
        out, into = weights[f"{layer}.weight"].shape
        a, b = (rng.normal(size=s).astype(np.float32) / 2 for s in ((3, into), (out, 3)))
        arrays |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
        changes[f"{layer}.weight"] = b @ a
    save_file(arrays, path)
    return changes


@pytest.mark.slow
def test_a_lora_draws_what_merged_weights_draw(case, draw, tmp_path):
    c, lora = case("t2v"), tmp_path / "style.safetensors"
    merged = shutil.copytree(c.folder, tmp_path / "merged")
    file = merged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for key, change in write_lora_file(weights, lora).items():
        weights[key] = weights[key] + np.float32(0.5) * change
    save_file(weights, file)
    got = draw(c.folder, c.settings() | {"lora": (f"{lora}:0.5",)})
    assert close(got, draw(merged, c.settings()))
    assert far(got, c.want)[0] > 1
    twice = draw(c.folder, c.settings() | {"lora": (f"{lora}:0.2", f"{lora}:0.3")})
    assert close(twice, got)
    with pytest.raises(ConfigError, match="two experts"):
        draw(c.folder, c.settings() | {"lora_2": (str(lora),)})
    save_file({"transformer.other.lora_A.weight": np.zeros((2, 2), np.float32)}, lora)
    with pytest.raises(WeightsError, match="is not a LoRA of the transformer of this model"):
        draw(c.folder, c.settings() | {"lora": (str(lora),)})


@pytest.mark.slow
def test_the_command_and_its_manifest(case, tmp_path):
    """In processes without torch: the clip of diffusers, and from its manifest every bit again."""
    c, out = case("a14b i2v"), tmp_path / "out.mp4"
    flags = [
        f"--{name}={value}"
        for name, value in c.settings().items()
        if name not in ("prompts", "guidance", "mesh")
    ]
    command(
        "vdx.sample",
        f"--weights={c.folder}",
        f"--prompt={PROMPT}",
        "--guidance=3.5,2.5",
        f"--out={out}",
        f"--save_array={tmp_path / 'x.npy'}",
        *flags,
    )
    made = np.load(tmp_path / "x.npy")
    assert close(made, c.want) and out.stat().st_size > 0
    manifest = read_json(out.with_suffix(".json"))
    assert manifest["request"]["fps"] == 16.0 and manifest["request"]["sampling"]["shift"] == 3.0
    # Without the array frames come as bytes from the device, and are the same.
    done = command(
        "vdx.sample",
        f"--weights={c.folder}",
        f"--out={tmp_path / 'again.mp4'}",
        f"--from_manifest={out.with_suffix('.json')}",
    )
    assert (tmp_path / "again.mp4").read_bytes() == out.read_bytes()
    again = read_json(tmp_path / "again.json")
    assert (
        again["pixels_sha256"]
        == manifest["pixels_sha256"]
        == hashlib.sha256(to_uint8(made).tobytes()).hexdigest()
    )
    lines = [line.split(":")[0].split(" (")[0] for line in done.stdout.splitlines()]
    assert lines == [
        "text_encoder",
        "2 prompts encoded",
        "vae",
        "images encoded",
        "transformer",
        "clips 1 to 1 of 1",
        "transformer_2",
        "clips 1 to 1 of 1",
        "vae",
        "clip 1 of 1",
        f"Wrote {tmp_path / 'again.mp4'}",
    ]

    made = PretrainedWeights(**manifest["weights"])
    opened = PretrainedWeights(str(c.folder), open_pretrained(c.folder).identity())
    check_weights(made, opened, "x")
    with pytest.raises(ConfigError, match="are not those of the manifest"):
        check_weights(made, PretrainedWeights("x", "0" * 64), "x")
    done = command("vdx.sample", "--weights=/nowhere", f"--prompt={PROMPT}", check=False)
    assert done.returncode == 1 and "vdx: /nowhere is not a folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_with_a_control_a_mask_and_references(case, tmp_path):
    c, out = case("vace"), tmp_path / "out.mp4"
    flags = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in c.settings().items()
        if name not in ("prompts", "mesh")
    ]
    command(
        "vdx.sample",
        f"--weights={c.folder}",
        f"--prompt={PROMPT}",
        f"--out={out}",
        f"--save_array={tmp_path / 'x.npy'}",
        *flags,
    )
    made = np.load(tmp_path / "x.npy")
    assert close(made, c.want)
    command(
        "vdx.sample",
        f"--weights={c.folder}",
        f"--from_manifest={out.with_suffix('.json')}",
        f"--out={tmp_path / 'again.mp4'}",
        f"--save_array={tmp_path / 'y.npy'}",
    )
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), made)


@pytest.mark.slow
def test_clips_at_once_and_one_network_at_a_time_on_a_mesh(case, draw, tmp_path, monkeypatch):
    """Three prompts, two at a time, over 2 x 2 devices; when a network is read, nothing of the
    one before is left."""
    load, there, left = Component.load, {id(a) for a in jax.live_arrays()}, []

    def watched(self, mesh):
        left.append(sum(a.nbytes for a in jax.live_arrays() if id(a) not in there) / self.size)
        return load(self, mesh)

    monkeypatch.setattr(Component, "load", watched)
    c = case("a14b t2v")
    noise = np.random.default_rng(0).normal(size=(3, *c.noise.shape[1:])).astype(np.float32)
    noise[1] = c.noise[0]
    np.save(tmp_path / "noise.npy", noise)
    settings = c.settings() | {
        "prompts": ("the grey cat", PROMPT, "a street"),
        "init_noise": str(tmp_path / "noise.npy"),
    }
    mesh = MeshSpec(data=1, fsdp=2, tensor=2).make(jax.devices()[:4])
    got = draw(c.folder, settings, mesh)
    assert got.shape[0] == 3 and close(got[1:2], c.want)
    assert far(got[:1], c.want)[0] > 1 and far(got[2:], c.want)[0] > 1
    assert len(left) == 4 and max(left) < 0.4  # bytes a parameter, of which each has four


@pytest.mark.slow
def test_in_bfloat16_it_is_near(case, draw):
    c = case("t2v")
    mean, _ = far(draw(c.folder, c.settings() | {"dtype": "bfloat16"}), c.want)
    assert 0.1 < mean < 4
