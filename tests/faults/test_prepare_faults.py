"""Killed and crashed work of vdx.prepare: the same bytes, and only the guilty file fails.

Figures of 40 kills: `python tests/kill_prepare.py`.
"""

import os
import signal

import pytest

from tests.kill_prepare import campaign
from vdx.data.preparation.runner import Local, WorkerDied

pytestmark = pytest.mark.faults


def test_killed_at_random_instants_it_gives_the_same_bytes(tmp_path):
    assert campaign(tmp_path, kills=3) >= 1


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
