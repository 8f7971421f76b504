"""Ways for a run to end well: preemption, a stuck step, a workdir that somebody else uses.

Exit codes: 0 done; 1 an error that a person must mend, explained; 42 preempted, all is saved and
the same command goes on; 75 (EX_TEMPFAIL of sysexits.h) stuck or short of a worker, the same
command may well go on. The launch scripts start again on 42 and 75.
"""

import contextlib
import datetime
import errno
import faulthandler
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

__all__ = [
    "PREEMPTED",
    "STUCK",
    "Preempted",
    "PreemptionHandler",
    "Watchdog",
    "WorkdirInUse",
    "exit_if_peer_lost",
    "exit_now",
    "lock_workdir",
]

PREEMPTED, STUCK = 42, 75


class Preempted(SystemExit):
    """The program was asked to end, and everything is saved."""

    def __init__(self):
        super().__init__(PREEMPTED)


class PreemptionHandler:
    """SIGTERM and SIGINT, answered between two steps; a context manager.

    One process: our handler remembers the signal. Several: JAX's own handler of SIGTERM tells
    every process, and all of them agree on the step after which they stop; SIGINT is passed on
    as SIGTERM. Outside of the training loop (`polled` False) there is nothing to save, and a
    signal ends the program at once; so does a second one, unless it comes within a second of the
    first, as when a terminal and a launcher both pass on the same wish.
    """

    def __init__(self):
        self.alone = jax.process_count() == 1
        self.polled, self._asked = False, 0.0  # when we were asked
        self._calls = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            # A handler of SIGTERM of ours would take the place of JAX's.
            for number in (signal.SIGTERM, signal.SIGINT) if self.alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.polled or (self._asked and now > self._asked + 1):
            raise Preempted
        if self._asked:
            return
        self._asked = now
        print(
            "\nAsked to stop: saving after this step. Once more to stop now.",
            file=sys.stderr,
            flush=True,
        )
        if not self.alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to save and stop now; every process calls this once after every step."""
        if self.alone:
            return bool(self._asked)
        self._calls += 1  # not the step, which may go back
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def end_polling(self) -> None:
        """The loop is over. From now on a signal ends the program at once, also where JAX's
        handler would only take note of it."""
        self.polled = False
        if not self.alone and threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)


class Watchdog:
    """Ends a process that makes no progress; a context manager.

    Without a `beat()` for `seconds` (0: never) it prints the stacks of all threads, calls each
    of `before_exit`, for at most `grace` seconds, and exits with STUCK. It needs no help from the
    thread that hangs.
    """

    def __init__(
        self,
        seconds: float,
        before_exit: tuple[Callable[[], object], ...] = (),
        grace: float = 60.0,
    ):
        self.seconds, self.before_exit, self.grace = seconds, before_exit, grace
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                self._end()

    def _end(self) -> None:
        print(
            f"\nNo step for {self.seconds:g} s (config.train.watchdog_seconds): ending with exit "
            f"code {STUCK}. Every thread's stack, the latest call first:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        for action in self.before_exit:
            helper = threading.Thread(target=action, daemon=True)
            helper.start()
            helper.join(self.grace)
        sys.stderr.flush()
        os._exit(STUCK)


def exit_now(code: int, message: str) -> NoReturn:
    """Ends the program with a message as its last words, once all is closed.

    At once: Python's own way out waits for the other processes, which wait in turn for this one,
    and has Orbax's threads print pages about a failed save.
    """
    sys.stdout.flush()
    print(f"\nvdx: {message}", file=sys.stderr, flush=True)
    os._exit(code)


@contextlib.contextmanager
def exit_if_peer_lost(before_exit: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Ends this process with STUCK when one of its peers has ended. What is in the block may have
    a save under way, which cannot finish without the peer and must not be waited for."""
    try:
        yield
    except Exception as error:
        signs = (jax.errors.JaxRuntimeError, TimeoutError)  # of a collective, of a barrier
        lost = isinstance(error, signs) or isinstance(error.__cause__, signs)
        if jax.process_count() == 1 or not lost or "RESOURCE_EXHAUSTED" in str(error):
            raise
        before_exit()
        exit_now(
            STUCK,
            f"process {jax.process_index()} of {jax.process_count()} lost touch with "
            f"another one, whose log says why: {str(error).splitlines()[0]:.300}",
        )


class WorkdirInUse(ValueError):
    """Another process is writing in the workdir."""


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this process; the kernel lets go of it however the process ends.

    Raises WorkdirInUse, which names the holder.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                print(
                    f"{workdir} is on a file system without locks ({error.strerror}): nothing "
                    "prevents a second process from writing there.",
                    file=sys.stderr,
                )
            else:
                file.seek(0)
                raise WorkdirInUse(
                    f"{workdir} is in use by {file.read().strip() or 'a process'}. "
                    "End that one first, or choose another workdir."
                ) from None
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since "
            f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n"
        )
        file.flush()
        yield
