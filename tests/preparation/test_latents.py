"""From mp4s to cached latents to training, with a tiny random Wan, by the real commands."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.command_line import run_here
from tests.kill_prepare import tree, write_footage
from tests.wan_pipelines import pipeline
from vdx.data.sources import Records
from vdx.data.transforms import ClipSampling, to_example
from vdx.files import read_rows
from vdx.generate.pretrained import PretrainedGenerator
from vdx.generate.pretrained_pipeline import PretrainedPipeline
from vdx.interop.components import open_component
from vdx.interop.pretrained import open_pretrained

FRAMES, HEIGHT, WIDTH, FPS = 9, 32, 48, 8.0
SETTINGS = (
    f"--config.latents.num_frames={FRAMES}",
    f"--config.latents.height={HEIGHT}",
    f"--config.latents.width={WIDTH}",
    f"--config.latents.fps={FPS}",
    "--config.latents.dtype=float32",
)
LORA = (
    "--config=configs/wan21_t2v_1p3b_lora.py:smoke",
    "--config.model.backbone.mlp_ratio=1.3333333333",
    "--config.data.loader.global_batch=8",
    "--config.eval.loss=null",
    "--config.optim.warmup_steps=1",
)


def prepare(capsys, source: Path, out: Path, weights: Path, *more: str):
    return run_here(
        capsys,
        "vdx.prepare",
        "--workers=0",
        f"--source={source}",
        f"--out={out}",
        "--until=latents",
        f"--weights={weights}",
        *SETTINGS,
        *more,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with footage and two tiny models."""
    root = tmp_path_factory.mktemp("latents")
    write_footage(root / "in", 3, frames=30)
    (root / "in" / "1.txt").write_text("a cat walks")
    for kind in ("t2v", "i2v"):
        pipeline(kind).save_pretrained(root / kind)
    return root


@pytest.fixture
def prepared(place, capsys, monkeypatch) -> Path:
    """The folder of the footage prepared by the model `t2v`, made once."""
    monkeypatch.chdir(Path(__file__).parents[2])
    out = place / "out"
    if not out.exists():
        ended = prepare(capsys, place / "in", out, place / "t2v")
        assert ended.code == 0, ended.err
        assert "6 pieces hold 6.8 of the 7.5 seconds" in ended.out
    return out


@pytest.mark.slow
def test_cached_latents_are_those_of_encoding_in_the_step(place, prepared, mesh):
    """Each piece: the frames that training reads of the same clip, through the same VAE."""
    component = open_component("vae", place / "t2v" / "vae", "float32")
    params = component.load(mesh)
    encode = jax.jit(
        lambda x: component.module.apply({"params": params}, x, method="encode").mode()
    )
    latents = Records(str(prepared), split="all")
    clips = Records(str(prepared / "clips"), split="all")
    assert len(latents) == 6 and len(clips) == 3
    found = {latents[i]["key"]: latents[i] for i in range(len(latents))}
    sampling = ClipSampling(num_frames=FRAMES, fps=FPS, start="first")
    for index in range(len(clips)):
        record = clips[index]
        example = to_example(
            record,
            clip=sampling,
            height=HEIGHT,
            width=WIDTH,
            tokenize=lambda caption: (np.zeros(1), np.ones(1)),
            num_frames=FRAMES,
            rng=np.random.default_rng(0),
        )
        want = encode(example["video"][None].astype(np.float32) / 127.5 - 1)[0]
        name = record.attributes["source"].decode()
        row = found[f"{name} at 0.000 s"]
        got, want = (np.asarray(x, np.float32) for x in (row["latents"], want))
        assert got.std() > 0.1
        # The step computes in bfloat16, whose numbers are 2**-8 apart.
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
        near = np.abs(got.astype(jnp.bfloat16) - want.astype(jnp.bfloat16)) <= 2**-7 * abs(want)
        assert near.all()
    np.testing.assert_array_equal(found["0.mp4 at 0.000 s"]["fps"], FPS)


@pytest.mark.slow
def test_texts_are_those_of_the_model(place, prepared, mesh):
    pipe = PretrainedPipeline(place / "t2v", "float32", {"data": 8})
    request = pipe.request(["a cat walks"], negative_prompt="", num_frames=FRAMES, height=HEIGHT,
                           width=WIDTH)  # fmt: skip
    with jax.set_mesh(mesh):
        encoded = PretrainedGenerator(pipe.model, request, mesh).encode_text()
    want, null = (text[mask] for text, mask in zip(*encoded.values(), strict=True))
    data = Records(str(prepared), split="all")
    rows = [data[i] for i in range(len(data))]
    row = next(row for row in rows if row["key"].startswith("1.mp4"))
    np.testing.assert_allclose(row["text"][row["text_mask"]], want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(data.metadata["null"], null[0], rtol=1e-3, atol=1e-3)
    assert len(null) == 1


@pytest.mark.slow
def test_killed_and_run_again_it_gives_the_same_bytes(place, prepared, capsys, tmp_path):
    expected = tree(prepared)
    again = tmp_path / "again"
    shutil.copytree(prepared, again)
    files = sorted((again / "cache" / "latents").rglob("*.npz"))
    files[1].unlink()  # as if the run had been killed before it
    (files[0].parent / ".half.1.npz").write_bytes(b"half a file")
    shutil.rmtree(again / "latents")
    assert prepare(capsys, place / "in", again, place / "t2v").code == 0
    assert tree(again) == expected
    ended = prepare(capsys, place / "in", again, place / "t2v")
    assert "as before" in ended.out and "parameters read" not in ended.out
    assert tree(again) == expected


@pytest.mark.slow
def test_it_trains_and_other_encoders_are_refused(place, prepared, capsys, tmp_path):
    workdir = tmp_path / "run"
    data = f"--config.data.path={prepared}"
    model = f"--config.weights={place / 't2v' / 'transformer'}"
    ended = run_here(capsys, "vdx.main", *LORA, f"--workdir={workdir}", data, model)
    assert ended.code == 0, ended.err
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row]
    assert len(rows) == 4 and np.isfinite([row["train/loss"] for row in rows]).all()

    other = tmp_path / "other"
    shutil.copytree(place / "t2v", other)
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = load_file(file)
    arrays["encoder.conv_in.weight"] = arrays["encoder.conv_in.weight"] * np.float32(1.01)
    save_file(arrays, file, {"format": "pt"})
    model = f"--config.weights={other / 'transformer'}"
    ended = run_here(capsys, "vdx.main", *LORA, f"--workdir={tmp_path / 'b'}", data, model)
    assert ended.code and "Traceback" not in ended.err
    assert "made by other encoders" in ended.err and "vae: " in ended.err
    assert "text_encoder: " not in ended.err


@pytest.mark.slow
def test_it_shows_what_the_latents_decode_to(place, prepared, capsys, tmp_path):
    page = tmp_path / "page.html"
    args = (f"--show={prepared}", f"--out={page}", f"--weights={place / 't2v'}")
    assert run_here(capsys, "vdx.prepare", *args).code == 0
    text = page.read_text()
    assert text.count("<video") == 6 and "a cat walks" in text
    assert len(list((tmp_path / "page_media").glob("*.mp4"))) == 6


@pytest.mark.slow
def test_image_to_video_has_the_conditions_of_its_first_frame(
    place, prepared, capsys, mesh, tmp_path
):
    """`concat` and `image_tokens` are those of a request with the first frame as its image."""
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    assert prepare(capsys, place / "in", out, place / "i2v").code == 0
    data = Records(str(out), split="all")
    row = next(data[i] for i in range(6) if data[i]["key"] == "0.mp4 at 0.000 s")
    record = next(
        record
        for record in (Records(str(out / "clips"), split="all")[i] for i in range(3))
        if record.attributes["source"] == b"0.mp4"
    )
    example = to_example(
        record,
        clip=ClipSampling(num_frames=FRAMES, fps=FPS, start="first"),
        height=HEIGHT,
        width=WIDTH,
        tokenize=lambda caption: (np.zeros(1), np.ones(1)),
        num_frames=FRAMES,
        rng=np.random.default_rng(0),
    )
    Image.fromarray(example["video"][0]).save(tmp_path / "first.png")
    pipe = PretrainedPipeline(place / "i2v", "float32", {"data": 8})
    request = pipe.request(["a cat"], image=tmp_path / "first.png", num_frames=FRAMES,
                           height=HEIGHT, width=WIDTH, preprocess="diffusers")  # fmt: skip
    with jax.set_mesh(mesh):
        want = PretrainedGenerator(pipe.model, request, mesh).image_conditions()
    for name in ("concat", "image_tokens"):
        np.testing.assert_allclose(row[name], want[name][0], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_an_identity_is_that_of_the_weights_in_any_layout(place, tmp_path):
    model = open_pretrained(place / "t2v")
    model.save(tmp_path / "own", own=True)
    own = open_pretrained(tmp_path / "own")
    for name, component in model.components.items():
        assert component.identity() == own.components[name].identity()
    other = open_component("vae", place / "i2v" / "vae", "float32")
    assert other.identity() == model.components["vae"].identity()  # the same seed
    assert model.components["vae"].identity() != model.components["text_encoder"].identity()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.latents.num_frames=8"], "expected 1 + 4n frames"),
        (["--config.latents.height=40"], "multiples of 16"),
        (["--config.latents.num_frames=41"], "too short"),
        (["--until=clips"], "--weights is read by --until=latents"),
    ],
)
def test_mistakes_are_refused(place, prepared, capsys, args, message):
    ended = prepare(capsys, place / "in", prepared, place / "t2v", *args)
    assert ended.code and message in ended.err + ended.out and "Traceback" not in ended.err
