"""No crash, no hang, no memory, no wrong numbers: hostile files against every reader.

The classes and the ways to damage a file are in tests/hostile; `python -m tests.hostile.run`
prints the table and names the cases.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.hostile.classes import CLASSES
from tests.micro_run import ROOT

MOST_MEMORY = 256  # MiB that reading one file of a few kilobytes may take
MORE = 5  # times as many cases in the slow suite


def run(path, *flags):
    """Return the results of all classes, from a process that has no threads yet."""
    command = [sys.executable, "-m", "tests.hostile.run", f"--json={path}", *flags]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("hostile") / "results.json")


def check(result):
    assert not result["problems"], "\n".join(result["problems"][:20])
    assert result["tried"] == sum(result["outcomes"].values())
    assert set(result["outcomes"]) == {"refused", "read"}  # the damage is neither all nor nothing
    assert result["most_memory"] < MOST_MEMORY


@pytest.mark.parametrize("name", CLASSES)
def test_hostile_files_are_refused_or_read_right(name, results):
    check(results[name])


@pytest.mark.slow
def test_more_hostile_files(tmp_path):
    names = [name for name in CLASSES if name != "config"]  # one that is read: a network's shapes
    results = run(tmp_path / "results.json", f"--times={MORE}", f"--only={','.join(names)}")
    for name in names:
        assert results[name]["tried"] == MORE * CLASSES[name].cases
        check(results[name])
