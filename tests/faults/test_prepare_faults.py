"""Killed and crashed work of vdx.prepare: the same bytes, and only the guilty file fails.

Figures of 40 kills: `python tests/kill_prepare.py`.
"""

import os
import signal
import time

import pytest

from tests.kill_prepare import campaign, start, write_footage
from vdx.data.preparation.runner import Local, WorkerDied
from vdx.exits import INTERRUPTED

pytestmark = pytest.mark.faults


def test_killed_at_random_instants_it_gives_the_same_bytes(tmp_path):
    assert campaign(tmp_path, kills=3) >= 1


def test_an_interrupt_ends_it_at_once_with_its_workers(tmp_path):
    write_footage(tmp_path / "in", 1, frames=2_000)  # more than the seconds that are waited
    process = start(tmp_path / "in", tmp_path / "out", tmp_path / "log")
    cache = tmp_path / "out" / "cache"
    while not cache.exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == INTERRUPTED
    assert "Traceback" not in (tmp_path / "log").read_text()
    deadline = time.monotonic() + 60  # a worker that has just started imports its modules first
    while has_processes(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_processes(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def square_or_die(number):
    if number in (2, 7):
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_worker_that_dies_fails_only_its_item():
    results = Local(workers=2).map(square_or_die, range(10), "squares")
    assert [isinstance(result, WorkerDied) for result in results] == [
        number in (2, 7) for number in range(10)
    ]
    assert [result for result in results if not isinstance(result, WorkerDied)] == [
        number * number for number in range(10) if number not in (2, 7)
    ]
