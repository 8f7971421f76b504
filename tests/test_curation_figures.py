"""The figures of curation on a second seed, within the bounds that are promised."""

import subprocess
import sys
from pathlib import Path

import pytest

from vdx.files import read_json

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_cuts_and_near_duplicates_of_planted_footage(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/curation.py", f"--out={out}", "--sources=10"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in read_json(out)["rows"]}

    assert rows["hard cuts"]["f1"] >= 0.93
    assert rows["gradual transitions"]["recall"] >= 0.6
    assert rows["gradual transitions"]["precision"] >= 0.9
    assert rows["near-duplicates"]["precision"] >= 0.95
    assert rows["near-duplicates"]["recall"] >= 0.9
    assert rows["look"]["source_seconds_per_cpu_second"] >= 4
