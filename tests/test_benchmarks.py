"""The scripts against torch at small sizes: they finish, and both sides give the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdx.files import read_json

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def rows(script: str, tmp_path: Path, *args: str) -> list[dict]:
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", f"--out={out}", "--runs=1", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = read_json(out)["rows"]
    assert all(row["seconds"] > 0 for row in found if "seconds" in row)
    return found


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_transformer(dtype, apart, tmp_path):
    found = rows("transformer", tmp_path, "--size=toy", f"--dtype={dtype}", "--nocompile")
    assert {row["by"] for row in found if row["what"] == "forward"} == {"torch", "vdx"}
    assert {row["by"] for row in found if row["what"] == "training step"} == {
        "torch",
        "torch, checkpoints",
        "vdx, remat none",
        "vdx, remat save_attention",
        "vdx, remat full",
    }
    assert all(row["apart"] < apart for row in found if row["what"] == "forward")


def test_attention(tmp_path):
    found = rows("attention", tmp_path, "--tokens=200")
    assert {row["backend"] for row in found} == {"torch", "xla", "blockwise"}
    for row in found:
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 0.02), row


def test_sampling(tmp_path):
    found = rows("sampling", tmp_path, "--sizes=small")
    assert len(found) == 3 and all(row["error"] < 1e-4 for row in found)


def test_vae_decode(tmp_path):
    found = rows("vae_decode", tmp_path, "--base_dim=8", "--frames=5", "--side=32")
    assert all(row["error"] < 1e-4 for row in found)
