"""The four lines of docs/finetune.md: from a folder of mp4s to a LoRA file and a clip."""

from pathlib import Path

import numpy as np
import pytest

from tests.command_line import run_here
from tests.kill_prepare import write_footage
from tests.wan_pipelines import NETWORK, VAE, assembled, scheduler
from vdx.files import read_json

ROOT = Path(__file__).parents[1]
FRAMES, HEIGHT, WIDTH = 9, 32, 48


@pytest.mark.slow
def test_a_folder_of_mp4s_becomes_a_lora_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    weights = tmp_path / "Tiny-Wan"
    network = NETWORK | {"ffn_dim": 96}  # that of the smoke configs
    assembled(network, scheduler("unipc"), None, False, VAE).save_pretrained(weights)
    write_footage(tmp_path / "footage", 5, frames=30)
    size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}

    def line(module, *args):
        ended = run_here(capsys, module, *args)
        assert ended.code == 0, ended.err
        return ended

    line(
        "vdx.prepare",
        f"--source={tmp_path / 'footage'}",
        f"--out={tmp_path / 'data'}",
        "--until=latents",
        f"--weights={weights}",
        "--workers=0",
        "--config.latents.fps=8.0",
        *(f"--config.latents.{name}={value}" for name, value in size.items()),
    )
    line(
        "vdx.main",
        "--config=configs/wan21_t2v_1p3b_lora.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        f"--config.weights={weights / 'transformer'}",
        f"--config.data.path={tmp_path / 'data'}",
        "--config.data.loader.global_batch=8",
        "--config.train.sample_every=0",
        "--config.optim.learning_rate=0.03",  # so that two steps are seen in the pixels
        "--config.optim.warmup_steps=1",
    )
    lora = tmp_path / "lora.safetensors"
    line("vdx.export", f"--workdir={tmp_path / 'run'}", f"--out={lora}", "--layout=comfyui")

    def sample(name, *more):
        line(
            "vdx.sample",
            f"--weights={weights}",
            "--prompt=a cat walks",
            "--steps=2",
            *(f"--{flag}={value}" for flag, value in size.items()),
            f"--out={tmp_path / name}.mp4",
            f"--save_array={tmp_path / name}.npy",
            *more,
        )
        return np.load(tmp_path / f"{name}.npy")

    plain = sample("plain")
    adapted = sample("adapted", f"--lora={lora}")
    assert adapted.shape == (1, FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(adapted - plain).mean() > 0.01
    assert read_json(tmp_path / "adapted.json")["request"]["lora"]
