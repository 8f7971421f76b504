"""The figures of README command 1 at full length; CI runs it and names its workdir."""

import os
from pathlib import Path

import numpy as np
import pytest

from vdx.files import read_json, read_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "VDX_FULL_RUN" not in os.environ, reason="needs VDX_FULL_RUN, the workdir of a full run"
    ),
]


@pytest.fixture(scope="module")
def workdir() -> Path:
    return Path(os.environ["VDX_FULL_RUN"])


def test_figures(workdir, capsys):
    result = read_json(workdir / "eval.json")["prompt_following"]
    rows = read_rows(workdir / "metrics.jsonl")
    wait = float(np.median([r["speed/data_wait"] for r in rows if "speed/data_wait" in r]))
    with capsys.disabled():
        print(
            f"\nscores {result['scores']}\nchance {result['chance']}\n"
            f"training {rows[-1]['seconds']:.0f} s, waiting for data {wait:.1%}"
        )
    assert result["prompts"] == 128
    assert result["true_renders"]["all"] >= 0.99
    assert result["scores"]["all"] >= 0.8 > 4 * result["chance"]["all"]
    assert wait < 0.05
    assert rows[-1]["seconds"] < 600


def test_captions_help(workdir):
    """The validation loss with captions is below the loss without them, and falls in training."""
    rows = [r for r in read_rows(workdir / "metrics.jsonl") if "validation/loss" in r]
    assert rows[-1]["validation/loss"] < 0.9 * rows[-1]["validation/loss_null"]
    assert rows[-1]["validation/loss"] < rows[0]["validation/loss"]
