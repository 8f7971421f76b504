"""Processes that read data: how they end, which grain leaves open.

grain starts the processes and detects one that died with an error. It does not detect one that
hangs, leaves them running when the trainer is killed, and waits 25 s at exit for each that hangs.
Here a worker ends with its parent, ends at once on request, and never delays an exit.
"""

import atexit
import contextlib
import faulthandler
import functools
import multiprocessing.util  # registers its own exit handler now, so that it runs after ours
import os
import re
import signal
import sys
import threading
import time
import weakref
from multiprocessing.process import BaseProcess
from typing import TypeVar

import grain
from absl import flags

from vdx.exits import STUCK

__all__ = ["WorkerDied", "close", "died", "dump_workers", "kill_workers", "with_workers"]

T = TypeVar("T")

PATIENCE = 5.0  # seconds in which a worker may finish what it reads, before it is killed
# Open files at most. Every array that a worker hands over is one, until it is used.
MAX_OPEN_FILES = 1 << 16
_open: weakref.WeakSet[grain.DatasetIterator] = weakref.WeakSet()  # readers to end at exit


class WorkerDied(RuntimeError):
    """The death of a process that reads data; next() begins the same batch again."""

    exit_code = STUCK  # whatever restarts the run starts it again


def with_workers(
    dataset: grain.IterDataset[T], workers: int, buffer: int
) -> grain.DatasetIterator[T]:
    """Return grain's iterator over a dataset that processes read; end it by `close`.

    buffer: items that each worker reads ahead.
    """
    if not flags.FLAGS.is_parsed():  # grain's workers inherit flags and hang without
        flags.FLAGS.mark_as_parsed()
    _raise_open_file_limit()

    items = iter(
        dataset.mp_prefetch(
            grain.MultiprocessingOptions(workers, buffer),
            worker_init_fn=functools.partial(_init_worker, os.getpid()),
        )
    )
    _open.add(items)
    return items


def close(items: grain.DatasetIterator) -> None:
    """End a reader, its threads and workers.

    If a worker does not end by itself, all workers of this process are killed: grain would wait
    for it without limit.
    """
    _open.discard(items)
    # In a thread, since it may never return.
    closing = threading.Thread(target=items.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    if closing.is_alive():
        kill_workers()
        closing.join(PATIENCE)


def kill_workers() -> None:
    """Kill every worker of this process, at once and without waiting.

    Any thread may call it. A next() that waits for one of the workers then raises WorkerDied.
    """
    for process in _workers():
        process.kill()


def dump_workers() -> None:
    """Make every worker print the stacks of its threads to stderr.

    It takes a moment. A watchdog calls it before `kill_workers`. A worker that has not begun to
    read is ended by it.
    """
    for process in _workers():
        assert process.pid is not None  # it has been started
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.05)  # keeps the lines of two workers apart


def died(error: BaseException, position: int) -> WorkerDied | None:
    """Return the error to raise instead, if `error` is grain's for a worker that died.

    position: the batch that was being read.
    """
    # grain raises a plain RuntimeError; only its text names the cause.
    found = re.match(r"Worker process was terminated .* exit code (-?\d+)", str(error))
    if found is None:
        return None
    code = int(found[1])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"
    return WorkerDied(
        f"A process that reads data {how} before batch {position} was whole. If it crashed, its "
        "stack is in the log above; SIGKILL without one is most often the kernel's, for want of "
        "memory: then lower workers, threads or prefetch in config.data.loader. workers = 0 reads "
        "in the main process, where the cause is easier to see. Resuming loses nothing."
    )


def _init_worker(parent: int, index: int, count: int) -> None:
    """Prepare a worker: ignore group signals, print stacks, end with the parent."""
    # The trainer ends its workers. A signal to the whole group, as ^C and batch systems send,
    # must leave it the data for the steps before its last save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    if sys.platform == "linux":
        _request_kill_with_parent()


def _end_with_parent(parent: int) -> None:
    """Kill this process as soon as its parent is gone; runs in a thread."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _request_kill_with_parent() -> None:
    """Make the kernel kill this process when the pipe from the parent closes.

    The thread of `_end_with_parent` does not run while a hanging decoder holds the interpreter.
    PR_SET_PDEATHSIG would kill at the end of the thread that started this process, grain's.
    """
    import fcntl

    process = multiprocessing.parent_process()
    assert process is not None
    pipe = process.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _workers() -> list[BaseProcess]:
    """Return the living workers of this process, by grain's names for them."""
    return [p for p in multiprocessing.active_children() if p.name.startswith("grain-process-")]


def _raise_open_file_limit() -> None:
    """Raise the limit of open files as far as the system allows."""
    import resource  # not on Windows, where workers = 0 still reads

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # macOS allows fewer than it reports
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@atexit.register
def _end_all() -> None:
    """Kill the workers and close the readers at exit."""
    kill_workers()
    for items in list(_open):
        with contextlib.suppress(Exception):  # the process ends; nothing handles the error
            items.close()
