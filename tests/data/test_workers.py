"""Worker processes that are killed, crash or hang: an error in time, and no orphan."""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vdx.data import workers
from vdx.data.pipeline import make_loader

ROOT = Path(__file__).parents[2]
SOON = 10.0  # seconds after a fault; a busy machine takes as long to start workers
on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

FAULTS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "sys.exit": lambda: sys.exit(3),
    "hang": lambda: time.sleep(1e6),
    "hang, holding the interpreter": lambda: ctypes.PyDLL(None).sleep(1000),
}
WORDS = {
    "killed": "was killed by SIGKILL",
    "segfault": "was killed by SIGSEGV",
    "sys.exit": "left with code 3",
}


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Ready examples with a fault at one of them; if `once` names a file, only the first time."""

    fault: str = ""
    at: int = 30
    once: str = ""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if self.fault and index == self.at and not (self.once and os.path.exists(self.once)):
            if self.once:
                open(self.once, "w").close()
            FAULTS[self.fault]()
        return {"x": np.full((8, 8), index), "key": f"record {index}"}


def loader(*fields, **settings):
    settings = {
        "global_batch": 4,
        "workers": 2,
        "threads": 1,
        "prefetch": 1,
        "shuffle": False,
        **settings,
    }
    return make_loader(Faulty(*fields), **settings)


def read_on(batches, count=12):
    return [next(batches)["x"][:, 0, 0].tolist() for _ in range(count)]


def since(file):
    """Return the seconds since the fault that made the file."""
    return time.time() - file.stat().st_mtime


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    end = time.monotonic() + 5
    while workers._workers() and time.monotonic() < end:
        time.sleep(0.1)
    assert not workers._workers()


@pytest.mark.faults
@pytest.mark.parametrize("fault", WORDS)
def test_a_worker_that_dies_is_an_error_in_time_and_loses_no_batch(tmp_path, fault, capfd):
    once = tmp_path / "once"
    batches = loader(fault, 30, str(once))
    with pytest.raises(workers.WorkerDied) as stop:
        read_on(batches)
    assert since(once) < SOON
    assert f"{WORDS[fault]} before batch {batches.position} was whole" in str(stop.value)
    assert not multiprocessing.active_children()
    if fault == "segfault":  # where it happened
        assert "__getitem__" in capfd.readouterr().err
    position = batches.position
    assert read_on(batches, 3) == read_on_from(position, 3)
    batches.close()


def read_on_from(position, count):
    return [list(range(4 * k, 4 * k + 4)) for k in range(position, position + count)]


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["hang", "hang, holding the interpreter"])
def test_workers_that_hang_print_their_stacks_and_are_killed_from_another_thread(
    tmp_path, fault, capfd
):
    hung, begin = tmp_path / "once", time.monotonic()
    batches = loader(fault, 20, str(hung))

    def watchdog():
        while time.monotonic() - begin < 60 and not hung.exists():
            time.sleep(0.1)
        time.sleep(0.5)
        workers.dump_workers()
        time.sleep(0.5)
        workers.kill_workers()

    thread = threading.Thread(target=watchdog)
    thread.start()
    with pytest.raises(workers.WorkerDied, match="SIGKILL"):
        read_on(batches)
    thread.join()
    assert since(hung) < SOON and batches.position <= 5
    assert "__getitem__" in capfd.readouterr().err


@pytest.mark.faults
def test_closing_does_not_wait_for_a_worker_that_hangs():
    batches = loader("hang", 5)
    read_on(batches, 1)
    time.sleep(0.5)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < workers.PATIENCE + 4
    assert not multiprocessing.active_children()


PROGRAM = """
import os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
from tests.data.test_workers import Faulty, loader, read_on
from vdx.data import workers

if __name__ == "__main__":
    mode = sys.argv[1]
    if mode == "files":
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 4096))
        read_on(loader(global_batch=64), 4)
    elif mode == "signals":
        received = []
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: received.append(1))
        batches = loader()
        read_on(batches, 2)
        print("ready", flush=True)
        while len(received) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        assert read_on(batches, 20)[-1] == [84, 85, 86, 87]
    else:
        batches = loader("hang, holding the interpreter", 14, sys.argv[2])
        read_on(batches, 2)
        while not os.path.exists(sys.argv[2]):
            time.sleep(0.1)
        if mode == "killed parent":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "error":
            raise ValueError("a bug")
        if mode == "watchdog":
            threading.Timer(1, lambda: (workers.kill_workers(), os._exit(75))).start()
            read_on(batches)
    print("end", flush=True)
"""


@contextlib.contextmanager
def started(tmp_path, mode):
    """Run the program in a process group of its own, by which its descendants are found."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(tests=str(ROOT)))
    with subprocess.Popen(
        [sys.executable, path, mode, tmp_path / "once"],
        text=True,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as program:
        yield program
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)


def members(group):
    """Return the living processes of a group, whatever their parent is by now."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def all_gone(group):
    end = time.monotonic() + 10
    while members(group) and time.monotonic() < end:
        time.sleep(0.1)
    return not members(group)


@on_linux
@pytest.mark.faults
@pytest.mark.parametrize(
    "mode, code", [("exit", 0), ("error", 1), ("watchdog", 75), ("killed parent", -9), ("files", 0)]
)
def test_a_program_ends_in_time_and_leaves_no_process(tmp_path, mode, code):
    with started(tmp_path, mode) as program:
        out, err = program.communicate(timeout=90)  # the pipes end with the last descendant
        assert program.returncode == code, out + err
        assert mode == "files" or since(tmp_path / "once") < SOON
        assert all_gone(program.pid)
        assert ("end" in out) == (code == 0)


@on_linux
@pytest.mark.faults
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_trainer(tmp_path):
    with started(tmp_path, "signals") as program:
        assert program.stdout.readline() == "ready\n"
        assert len(members(program.pid)) >= 3
        for name in (signal.SIGTERM, signal.SIGINT):
            os.killpg(program.pid, name)
            time.sleep(0.2)
        out, err = program.communicate(timeout=90)
        assert program.returncode == 0 and "end" in out, err
        assert all_gone(program.pid)


def test_no_other_error_is_taken_for_the_death_of_a_worker():
    assert workers.died(RuntimeError("a bug"), 3) is None
    assert workers.died(ValueError(), 3) is None
    workers.kill_workers()  # there are none
    workers.dump_workers()
