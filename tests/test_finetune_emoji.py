"""A LoRA fine-tune of real clips by the real command: stopped, resumed, and learning."""

import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.kill_training import arrays, whole_steps
from tests.test_finetune import ROOT, save_weights
from vdx.config.loader import resolve
from vdx.data.records import latent_features, write_records
from vdx.data.sources import VideoFolder
from vdx.experiment import Experiment
from vdx.files import read_rows
from vdx.models.vae.video_vae import VideoVAE
from vdx.train.preemption import PREEMPTED

CLIPS = ROOT.parent / "shared" / "data" / "fluent_emoji"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CLIPS.is_dir(), reason=f"the captioned clips of {CLIPS} are not here"),
]
CONFIG = "configs/wan21_t2v_1p3b_lora.py:smoke"
FRAMES, STEPS = 9, 200
SETTINGS = [
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=25",
    "--config.eval.loss.every=50",
    "--config.eval.loss.clips=16",
    "--config.train.ema=0.9",
    "--config.lora.rank=8",
    "--config.lora.dropout=0.05",
    "--config.optim.learning_rate=0.01",
    "--config.optim.warmup_steps=10",
]


def words(caption: str) -> np.ndarray:
    """[l 16]: a random vector for each word, the same wherever the word occurs."""
    return np.stack(
        [
            np.random.default_rng(zlib.crc32(word.encode())).standard_normal(16)
            for word in [*caption.lower().split(), ""]
        ]
    )


def encoded(clips: np.ndarray, randomise) -> np.ndarray:
    """Latents of a tiny random video autoencoder, normalised: [n 9 64 64 3] -> [n 3 8 8 4]."""
    vae = VideoVAE(base_dim=8, z_dim=4, num_res_blocks=1)
    x = clips.astype(np.float32) / 127.5 - 1
    params = randomise(jax.eval_shape(vae.init, jax.random.key(0), x[:1])["params"])
    encode = jax.jit(lambda x: vae.apply({"params": params}, x, method="encode").mode())
    z = np.concatenate([encode(x[i : i + 8]) for i in range(0, len(x), 8)])
    return (z - z.mean((0, 1, 2, 3))) / z.std((0, 1, 2, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory, randomise) -> Path:
    """A folder with `data` and `weights`."""
    root = tmp_path_factory.mktemp("emoji")
    folder = VideoFolder(str(CLIPS))
    records = [folder[i] for i in range(64)]
    latents = encoded(np.stack([r.read(np.arange(FRAMES) / 8) for r in records]), randomise)
    rows = [
        {
            "latents": z,
            "text": words(r.caption),
            "caption": r.caption,
            "fps": 8.0,
            "num_frames": FRAMES,
            "key": r.key,
        }
        for z, r in zip(latents, records, strict=True)
    ]
    longest = max(len(row["text"]) for row in rows)
    write_records(
        root / "data",
        {"train": rows[:48], "validation": rows[48:]},
        latent_features(latents.shape[1:], 16),
        metadata={
            "latents": list(latents.shape[1:]),
            "text": [longest, 16],
            "null": words("")[0].tolist(),
        },
    )
    made = Experiment(resolve(f"{ROOT}/{CONFIG}", []))
    save_weights(root / "weights", made.model, randomise(made.shapes))
    return root


def start(files: Path, workdir: Path) -> subprocess.Popen:
    env = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(files / "compiled"),
    }
    command = [
        sys.executable,
        "-m",
        "vdx.main",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--config.weights={files / 'weights'}",
        f"--config.data.path={files / 'data'}",
        *SETTINGS,
    ]
    with (files / f"{workdir.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=log)


def logged(workdir: Path) -> dict:
    return {
        (r["step"], k): v
        for r in read_rows(workdir / "metrics.jsonl")
        for k, v in r.items()
        if k.startswith(("train/", "validation/", "train_eval/"))
    }


def test_it_learns_and_goes_on_exactly(files):
    whole, parts = files / "whole", files / "parts"
    assert start(files, whole).wait(600) == 0, (files / "whole.log").read_text()[-3000:]
    losses = logged(whole)
    # Variance 1 of the latents and 1 of the noise: 2 is the loss of a network that is silent.
    first, last = (
        np.mean([losses[s, "train/loss"] for s in steps])
        for steps in (range(1, 6), range(STEPS - 19, STEPS + 1))
    )
    at_fixed_noise = [losses[step, "train_eval/loss"] for step in range(50, STEPS + 1, 50)]
    print(f"\ntraining loss {first:.2f} -> {last:.2f}; at fixed noise {at_fixed_noise}")
    assert last < min(1.8, 0.6 * first)
    assert at_fixed_noise == sorted(at_fixed_noise, reverse=True)
    assert at_fixed_noise[-1] < min(1.75, 0.9 * at_fixed_noise[0])
    assert losses[STEPS, "validation/loss"] < 0.95 * losses[50, "validation/loss"]

    child = start(files, parts)
    while not whole_steps(parts) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == PREEMPTED, (files / "parts.log").read_text()[-3000:]
    assert 25 <= max(whole_steps(parts)) < STEPS
    assert start(files, parts).wait(600) == 0, (files / "parts.log").read_text()[-3000:]
    assert "Resumes from step" in (files / "parts.log").read_text()
    assert arrays(parts, STEPS) == arrays(whole, STEPS)
    assert logged(parts) == losses
