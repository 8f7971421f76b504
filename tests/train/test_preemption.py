"""Signals, the watchdog and the lock of the workdir, each in a process of its own."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from vdx.train.preemption import PREEMPTED, STUCK, PreemptionHandler, WorkdirInUse, lock_workdir


def program(code: str) -> subprocess.Popen:
    """Python that says "ready" and is then in the middle of something."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ready(child: subprocess.Popen) -> None:
    assert child.stdout.readline() == "ready\n", child.stderr.read()


LOOP = """
    import time
    from vdx.train.preemption import Preempted, PreemptionHandler
    with PreemptionHandler() as stop:
        stop.polled = {polled}
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
            if stop.requested():
                time.sleep({saving})
                print("saved", flush=True)
                raise Preempted
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_between_two_steps(number):
    child = program(LOOP.format(polled=True, saving=0))
    ready(child)
    child.send_signal(number)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (PREEMPTED, "saved\n")
    assert "saving after this step" in err and "Traceback" not in err


def test_a_second_signal_ends_at_once():
    child = program(LOOP.format(polled=True, saving=60))
    ready(child)
    child.send_signal(signal.SIGTERM)
    while "saving after" not in child.stderr.readline():
        pass
    child.send_signal(signal.SIGINT)  # the same wish, passed on twice
    time.sleep(1.2)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=30)
    assert (child.returncode, out) == (PREEMPTED, "")


def test_outside_of_the_loop_a_signal_ends_at_once():
    child = program(LOOP.format(polled=False, saving=0))
    ready(child)
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=30)[0] == "" and child.returncode == PREEMPTED


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with PreemptionHandler():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_watchdog_ends_what_is_stuck():
    child = program("""
        import multiprocessing, time
        from vdx.train.preemption import Watchdog
        def a_step_that_never_ends():
            time.sleep(600)
        def a_helper_that_hangs():
            time.sleep(600)
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        worker.start()
        with Watchdog(1.0, (worker.kill, a_helper_that_hangs), grace=0.5):
            print("ready", flush=True)
            a_step_that_never_ends()
    """)
    ready(child)
    begin = time.monotonic()
    _, err = child.communicate(timeout=30)
    assert child.returncode == STUCK and time.monotonic() - begin < 10
    assert "No step for 1 s" in err and "a_step_that_never_ends" in err


def test_the_watchdog_lets_live_what_moves():
    child = program("""
        import time
        from vdx.train.preemption import Watchdog
        with Watchdog(0.6) as watchdog:
            print("ready", flush=True)
            for _ in range(10):
                time.sleep(0.2)
                watchdog.beat()
        time.sleep(1.0)
        print("done")
    """)
    ready(child)
    out, _ = child.communicate(timeout=30)
    assert (child.returncode, out) == (0, "done\n")


HOLD = """
    import sys, time
    from pathlib import Path
    from vdx.train.preemption import lock_workdir
    with lock_workdir(Path({path!r})):
        print("ready", flush=True)
        time.sleep(600)
"""


def test_a_workdir_has_one_writer(tmp_path):
    child = program(HOLD.format(path=str(tmp_path / "run")))
    ready(child)
    with (
        pytest.raises(WorkdirInUse, match=f"in use by process {child.pid} on"),
        lock_workdir(tmp_path / "run"),
    ):
        pass
    child.send_signal(signal.SIGKILL)  # the lock ends with its process, however that ends
    child.communicate()
    with lock_workdir(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / "lock").read_text()
    with lock_workdir(tmp_path / "run"):
        pass
