"""Processes that read data: what grain leaves open about how they end.

grain starts them and notices one that died with an error. It does not notice one that hangs,
leaves them running when the trainer is killed, and waits 25 s for each that hangs at the exit.
Here a worker ends with its parent, ends at once when asked, and never holds up an exit.
"""

import atexit
import contextlib
import faulthandler
import functools
import multiprocessing.util  # its own exit handler is registered now, so that it runs after ours
import os
import re
import signal
import sys
import threading
import time
import weakref
from typing import Any

import grain
from absl import flags

__all__ = ["WorkerDied", "close", "died", "dump_workers", "kill_workers", "with_workers"]

PATIENCE = 5.0  # seconds in which a worker may finish what it reads, before it is killed
FILES = 1 << 16  # open at most; every array that a worker hands over is one, until it is used
_open: weakref.WeakSet = weakref.WeakSet()


class WorkerDied(RuntimeError):
    """A process that reads data was killed or crashed; next() begins the same batch again."""


def with_workers(dataset: grain.IterDataset, workers: int, buffer: int) -> Any:
    """grain's iterator over `dataset`, read by processes; end it by `close`.

    buffer: items that each worker reads ahead.
    """
    if not flags.FLAGS.is_parsed():  # grain's workers inherit flags and hang without
        flags.FLAGS.mark_as_parsed()
    _allow_open_files()
    items = iter(
        dataset.mp_prefetch(
            grain.MultiprocessingOptions(workers, buffer),
            worker_init_fn=functools.partial(_begin, os.getpid()),
        )
    )
    _open.add(items)
    return items


def close(items: Any) -> None:
    """Ends a reader, its threads and workers. Where a worker does not end by itself, all workers
    of this process are killed: grain would wait for it for ever."""
    _open.discard(items)
    closing = threading.Thread(target=items.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    if closing.is_alive():
        kill_workers()
        closing.join(PATIENCE)


def kill_workers() -> None:
    """Kills every worker of this process, at once and without waiting. From any thread; a next()
    that waits for one of them then raises WorkerDied."""
    for process in _workers():
        process.kill()


def dump_workers() -> None:
    """Asks every worker to print the stacks of its threads to stderr, which takes a moment; for
    a watchdog, before `kill_workers`. One that has not begun to read is ended by it."""
    for process in _workers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.05)  # or their lines would mix


def died(error: BaseException, position: int) -> WorkerDied | None:
    """What to raise in place of `error`, if that is grain's word for a worker that died."""
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


def _begin(parent: int, index: int, count: int) -> None:
    """The start of a worker."""
    # The trainer ends its workers. A signal to the whole group, as ^C and batch systems send,
    # must leave it the data for the steps before its last save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if sys.platform == "linux":
        _killed_with_parent()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_with_parent() -> None:
    """By the kernel, when the pipe from the parent closes: the thread above does not run while a
    decoder that hangs holds the interpreter. (PR_SET_PDEATHSIG would kill at the end of the
    thread that started this process, which is grain's.)"""
    import fcntl

    process = multiprocessing.parent_process()
    assert process is not None
    pipe = process.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _workers() -> list:
    return [p for p in multiprocessing.active_children() if p.name.startswith("grain-process-")]


def _allow_open_files() -> None:
    import resource  # not on Windows, where workers = 0 still reads

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # macOS allows fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@atexit.register
def _end_all() -> None:
    kill_workers()
    for items in list(_open):
        with contextlib.suppress(Exception):  # nobody is left to hear of it
            items.close()
