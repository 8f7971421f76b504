"""The micro run: t2v_tiny at a size that trains in seconds, and commands as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.xla_flags import COMPILE_FAST
from vdx.config.loader import resolve

ROOT = Path(__file__).parents[1]
MICRO = [
    "--config.train.steps=6",
    "--config.train.log_every=2",
    "--config.eval.loss.every=3",
    "--config.train.sample_every=6",
    "--config.train.save_every=2",
    "--config.eval.loss.clips=8",
    "--config.data.loader.global_batch=8",
    "--config.data.clip.num_frames=(8,)",
    "--config.eval.prompt_following.prompts=4",
    "--config.eval.flicker.clips=2",
    "--config.eval.identity_drift.clips=2",
    "--config.model.backbone.width=32",
    "--config.model.backbone.depth=2",
    "--config.model.backbone.heads=2",
    "--config.sample.steps=3",
    "--config.sample.batch=2",  # of all drawn clips, so that one program draws them
    "--config.train.sample_prompts=('a red circle moves right', 'a blue square turns')",
]
# Python in which torch and TensorFlow, which the core path does not need, are not installed.
BLOCK = """
import sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        if name.split(".")[0] not in ("torch", "tensorflow"):
            return self.finder.find_spec(name, *args)
sys.meta_path[:] = map(Hide, sys.meta_path)
import runpy
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def config(*extra: str) -> dict:
    """Return the resolved micro config with further overrides."""
    return resolve(str(ROOT / "configs" / "t2v_tiny.py"), [*MICRO, *extra])


def command(module: str, *args: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a vdx command as a user does, on one device, with torch and TensorFlow blocked."""
    env = {**os.environ, "XLA_FLAGS": COMPILE_FAST, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, module, *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
