"""The whole path at a very small size: train, resume, sample, evaluate, report."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.micro_run import MICRO, ROOT, command, config
from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.records import latent_features, write_records
from vdx.experiment import load
from vdx.files import read_json, read_rows
from vdx.main import run
from vdx.train import compile as compile_module
from vdx.train.preemption import PreemptionHandler
from vdx.weights import open_params


def test_a_run_leaves_what_it_promises(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    steps = [r["step"] for r in rows if "train/loss" in r]
    assert steps == [2, 4, 6]
    assert all(
        np.isfinite(r["train/loss"]) and 0 <= r["speed/data_wait"] <= 1
        for r in rows
        if "train/loss" in r
    )
    assert [r["step"] for r in rows if "validation/loss" in r] == [3, 6]
    made = read_json(workdir / "config.json")
    assert made["train"]["steps"] == 6
    source = load(workdir).source()  # the mean of the pixels was measured, not given
    renders = np.stack([source[i].read(np.arange(8) / 8) for i in range(200)])
    assert abs(made["data"]["mean"] - (renders.mean() / 127.5 - 1)) < 0.05
    scores = read_json(workdir / "eval.json")
    assert set(scores) == {"loss", "prompt_following", "flicker", "identity_drift"}
    assert all(row["step"] == 6 for row in scores.values())
    assert scores["flicker"]["clips"] == 2 and scores["identity_drift"]["true"]["conclusive"] == 1
    result = scores["prompt_following"]
    assert result["prompts"] == 4 and len(list((workdir / "eval").glob("*.mp4"))) == 4
    assert result["true_renders"]["all"] == 1.0
    with Image.open(workdir / "eval" / "sample_grid.webp") as grid:
        assert grid.size == (6 * 160, 160) and grid.n_frames == 8
    assert len(list((workdir / "samples" / "00000006").glob("*.mp4"))) == 2
    page = (workdir / "report.html").read_text()
    assert "a red circle moves right" in page and "samples/00000006/000.mp4" in page
    assert any((workdir / "tensorboard").iterdir())


def test_bins_average_to_the_loss(workdir):
    """Every clip is in one bin, so the mean loss lies between the extremes of the bins."""
    for row in read_rows(workdir / "metrics.jsonl"):
        bins = [v for k, v in row.items() if k.startswith("train/loss_t")]
        if bins:
            assert min(bins) <= row["train/loss"] <= max(bins)


def test_resume_is_exact(workdir, tmp_path):
    """6 steps = 4 steps + the same command again, in every bit of weights and of losses.

    What is drawn and evaluated of the result is left out.
    """
    halved = tmp_path / "halved"
    shutil.copytree(workdir, halved)
    shutil.rmtree(halved / "checkpoints" / "6")
    loss = {"loss": read_json(workdir / "config.json")["eval"]["loss"]}
    command(
        "vdx.main",
        "--config=configs/t2v_tiny.py",
        f"--workdir={halved}",
        *MICRO,
        f"--config.eval={loss}",
        "--config.train.sample_every=0",
    )
    assert weights(halved) == weights(workdir)
    whole, parts = (
        {
            (r["step"], k): r[k]
            for r in read_rows(w / "metrics.jsonl")
            for k in r
            if k.startswith(("train/loss", "validation/", "train_eval/")) and r["step"] == 6
        }
        for w in (workdir, halved)
    )
    assert whole == parts and len(whole) > 10
    # The copy held rows of step 6 already; the second part must have written its own.
    assert sum(r["step"] == 6 for r in read_rows(halved / "metrics.jsonl")) == 4


def test_another_config_is_refused_and_overwrites_nothing(workdir, tmp_path):
    """Of keys that decide what is learned; see vdx.train.config_changes for the others.

    The lock names the process that last held the workdir, also one whose config is refused.
    """
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    lock = copy / "lock"
    read = lambda: {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p != lock}
    before = read()
    for override in ("optim.learning_rate=0.5", "model.backbone.width=64", "seed=1"):
        with pytest.raises(ConfigError, match=override.partition("=")[0]):
            run(config(f"--config.{override}"), copy, PreemptionHandler())
    assert read() == before


def weights(workdir: Path) -> str:
    experiment = load(workdir)
    mesh = experiment.mesh_spec.make(jax.devices()[:1])
    with jax.set_mesh(mesh):
        return open_params(experiment, workdir, mesh)[2]


def test_sample_from_a_file_of_prompts_and_make_again(workdir, tmp_path):
    """The manifest alone makes the same clips again, bit for bit."""
    prompts = tmp_path / "prompts.txt"
    lines = "a blue square moves up\r\n\r\na green\u2028cross grows\r\n"
    prompts.write_bytes(lines.encode("utf-16"))
    out, array = tmp_path / "clips", tmp_path / "x.npy"
    command(
        "vdx.sample",
        f"--workdir={workdir}",
        f"--prompts_file={prompts}",
        f"--out={out}",
        f"--save_array={array}",
        "--seed=5",
        "--steps=4",
        "--fps=4",
        "--sampler=euler",
        "--num_frames=16",
    )
    manifest = read_json(out / "manifest.json")
    assert [c["prompt"] for c in manifest["clips"]] == [
        "a blue square moves up",
        "a green\u2028cross grows",
    ]
    request = manifest["request"]
    assert (request["seed"], request["fps"], request["num_frames"]) == (5, 4.0, 16)
    assert (request["sampling"]["steps"], request["sampling"]["sampler"]) == (4, "euler")

    again, array2 = tmp_path / "again", tmp_path / "y.npy"
    command(
        "vdx.sample",
        f"--workdir={workdir}",
        f"--from_manifest={out / 'manifest.json'}",
        f"--out={again}",
        f"--save_array={array2}",
    )
    np.testing.assert_array_equal(np.load(array), np.load(array2))
    assert np.load(array).shape == (2, 16, 32, 32, 3)
    for name in ("000.mp4", "001.mp4"):
        assert (out / name).read_bytes() == (again / name).read_bytes() != b""


@pytest.fixture
def traced(monkeypatch):
    """Has an entry for each time that the step of a run of this test is traced."""
    traces = []
    real = compile_module.make_train_step

    def counting(*args, **kwargs):
        step = real(*args, **kwargs)

        def traced_step(*a):
            traces.append(1)
            return step(*a)

        return traced_step

    monkeypatch.setattr(compile_module, "make_train_step", counting)
    return traces


@pytest.mark.slow
def test_buckets_train_and_resume_exactly(tmp_path):
    """Two shapes, two programs; 3 steps = 2 steps and the rest, in every bit."""
    made = config(
        "--config.train.steps=3",
        "--config.eval={'loss': {'every': 3, 'clips': 8, 'times': (0.5,)}}",
        "--config.data.mean=-0.8",
        "--config.train.sample_every=0",
        "--config.train.save_every=2",
        "--config.train.log_every=1",
        "--config.train.max_to_keep=9",
        "--config.model.backbone.depth=1",
        "--config.data.loader.buckets=((16, 32, 32, 8), (8, 16, 32, 32))",
    )
    run(made, tmp_path / "whole", PreemptionHandler())
    rows = [r for r in read_rows(tmp_path / "whole" / "metrics.jsonl") if "train/loss" in r]
    assert all(np.isfinite(r["train/loss"]) for r in rows)
    per_clip = [r["speed/tokens_per_s"] / r["speed/clips_per_s"] for r in rows]
    np.testing.assert_allclose(per_clip, [128, 32, 128], rtol=1e-3)
    shutil.copytree(tmp_path / "whole", tmp_path / "halved")
    shutil.rmtree(tmp_path / "halved" / "checkpoints" / "3")
    run(made, tmp_path / "halved", PreemptionHandler())
    assert weights(tmp_path / "halved") == weights(tmp_path / "whole")
    again = {
        r["step"]: r["train/loss"]
        for r in read_rows(tmp_path / "halved" / "metrics.jsonl")
        if "train/loss" in r
    }
    assert again == {r["step"]: r["train/loss"] for r in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2v_base", "i2v_base"])
def test_the_base_configs_train_from_cached_latents(name, tmp_path, traced):
    """Shrunk by `:smoke`, on eight devices, through the whole entrypoint.

    Three batches, one program: nothing about a batch may reach the compiler.
    """
    rng = np.random.default_rng(0)
    more = {"t2v_base": {}, "i2v_base": {"image_tokens": (5, 16), "motion": ()}}[name]
    meta = {"latents": [4, 8, 8, 4], "text": [6, 32]}
    rows = [
        {
            "latents": rng.normal(size=(4, 8, 8, 4)).astype(np.float16),
            "text": rng.normal(size=(1 + i % 6, 32)).astype(np.float32),
            "caption": f"clip {i}",
            "fps": 8.0,
            "num_frames": 4,
            "key": f"clip {i}",
            **{k: rng.random(shape).astype(np.float16) for k, shape in more.items()},
        }
        for i in range(24)
    ]
    write_records(
        tmp_path / "data",
        {"train": rows[:16], "validation": rows[16:]},
        latent_features((4, 8, 8, 4), 32, **more),
        metadata=meta,
    )
    base = resolve(
        str(ROOT / "configs" / f"{name}.py:smoke"),
        [f"--config.data.path={tmp_path / 'data'}", "--config.eval.loss.times=(0.5,)"],
    )
    run(base, tmp_path / "run", PreemptionHandler())
    logged = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = {r["step"]: r["train/loss"] for r in logged if "train/loss" in r}
    assert sorted(losses) == [1, 2, 3] and np.isfinite(list(losses.values())).all()
    assert len(traced) == 1
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["i2v_tiny", "i2v_tiny:reference", "control_tiny:actions", "unet3d_tiny"]
)
def test_the_tiny_configs_run(name, tmp_path):
    """Shortened: they train, and are evaluated by the signals that they read."""
    file, _, variant = name.partition(":")
    micro = [one for one in MICRO if "backbone" not in one or file != "unet3d_tiny"]
    rows = {"loss": None, "control": None if file == "unet3d_tiny" else {"clips": 4}}
    made = resolve(
        str(ROOT / "configs" / f"{file}.py") + (f":{variant}" if variant else ""),
        [
            *micro,
            "--config.train.sample_every=0",
            "--config.train.save_every=6",
            "--config.data.mean=-0.8",
            f"--config.eval={rows}",
        ],
    )
    run(made, tmp_path, PreemptionHandler())
    losses = [r["train/loss"] for r in read_rows(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert len(losses) == 3 and np.isfinite(losses).all()
    expected = {
        "i2v_tiny": {"first_frame", "last_frame", "motion", "fps"},
        "i2v_tiny:reference": {"reference", "fps"},
        "control_tiny:actions": {"actions"},
        "unet3d_tiny": set(),
    }[name]
    if expected:
        rows = read_json(tmp_path / "eval.json")["control"]["signals"]
        assert {row["signal"] for row in rows} == expected
        assert all(key in row for row in rows for key in ("model", "without", "shuffled", "true"))
        assert "<h2>Control</h2>" in (tmp_path / "report.html").read_text()
