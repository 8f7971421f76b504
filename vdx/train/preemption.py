"""Orderly ends of a run: preemption, a stuck step, a lost peer, a workdir in use.

Exit codes: PREEMPTED when a signal stops the run, STUCK for a stuck run or a lost worker or peer.
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
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from vdx.exits import PREEMPTED, STUCK, exit_now

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

# A terminal and a launcher may both pass on one request; a second signal this many seconds later
# is a new request.
SAME_REQUEST = 1.0


class Preempted(SystemExit):
    """The end of a program that a signal stopped; the state is saved."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


class PreemptionHandler:
    """Context manager that turns SIGTERM and SIGINT into a stop between two steps.

    One process: our handler records the signal. Several processes: JAX's own handler of SIGTERM
    shares it, and all of them agree on the step after which they stop; SIGINT is passed on as
    SIGTERM. Outside of the training loop (`polled` False) there is nothing to save, and a signal
    ends the program at once. So does a second signal, unless it repeats the same request.
    """

    def __init__(self) -> None:
        self.alone = jax.process_count() == 1
        self.polled = False  # the training loop calls `requested` after every step
        self._requested_at = 0.0  # on the monotonic clock; 0: no request yet
        self._calls = 0
        self._previous: dict[int, object] = {}  # the handlers that ours replace

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            # Our handler of SIGTERM would replace JAX's.
            signals = (signal.SIGTERM, signal.SIGINT) if self.alone else (signal.SIGINT,)
            for number in signals:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal, or ends the program."""
        now = time.monotonic()
        is_new = now > self._requested_at + SAME_REQUEST
        if not self.polled or (self._requested_at and is_new):
            raise Preempted
        if self._requested_at:
            return
        self._requested_at = now
        print(
            "\nStop requested: saving after this step. Signal again to stop now.",
            file=sys.stderr,
            flush=True,
        )
        if not self.alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Return whether to save and stop now.

        Every process calls it once after every step.
        """
        if self.alone:
            return bool(self._requested_at)
        self._calls += 1  # not the step count, which may go back
        return multihost_utils.reached_preemption_sync_point(self._calls)

    def end_polling(self) -> None:
        """Mark the end of the loop: from now on a signal ends the program at once.

        JAX's handler, which only records a signal, is replaced too.
        """
        self.polled = False
        if not self.alone and threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)


class Watchdog:
    """Context manager that ends a process without progress.

    Without a `beat()` for `seconds` (0: never) it prints the stacks of all threads, calls each
    of `before_exit`, for at most `grace` seconds, and exits with STUCK. Its thread does not
    depend on the thread that hangs.
    """

    def __init__(
        self,
        seconds: float,
        before_exit: tuple[Callable[[], object], ...] = (),
        grace: float = 60.0,
    ):
        self.seconds = seconds
        self.before_exit = before_exit
        self.grace = grace
        self._last_beat = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Mark progress."""
        self._last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self.beat()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()

    def _watch(self) -> None:
        """Check the last beat until the block is left."""
        while not self._done.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last_beat > self.seconds:
                self._end()

    def _end(self) -> None:
        """Print all stacks, tidy up and end the process."""
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


@contextlib.contextmanager
def exit_if_peer_lost(before_exit: Callable[[], object] = lambda: None) -> Iterator[None]:
    """End this process with STUCK when another process of the run has ended.

    The block may have a save under way, which cannot finish without the peer; nothing waits
    for it.
    """
    try:
        yield
    except Exception as error:
        if not _is_lost_peer(error):
            raise
        before_exit()
        exit_now(
            STUCK,
            f"process {jax.process_index()} of {jax.process_count()} lost touch with "
            f"another one, whose log has the reason: {str(error).splitlines()[0]:.300}",
        )


def _is_lost_peer(error: Exception) -> bool:
    """Return whether an error is that of a collective or barrier that lost a peer."""
    kinds = (jax.errors.JaxRuntimeError, TimeoutError)
    is_collective = isinstance(error, kinds) or isinstance(error.__cause__, kinds)
    out_of_memory = "RESOURCE_EXHAUSTED" in str(error)
    return jax.process_count() > 1 and is_collective and not out_of_memory


class WorkdirInUse(ValueError):
    """Another process writes in the workdir."""


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Lock the workdir for this process.

    The kernel unlocks it, however the process ends. Raises WorkdirInUse, which names the
    process that has the lock.
    """
    workdir.mkdir(parents=True, exist_ok=True)

    # The file stays: only the lock counts, and removing it would race with a second process.
    with (workdir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Locked by another process, unless the file system has no locks.
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                raise WorkdirInUse(
                    f"{workdir} is in use by {file.read().strip() or 'a process'}. "
                    "End that one first, or choose another workdir."
                ) from None

            print(
                f"{workdir} is on a file system without locks ({error.strerror}): nothing "
                "prevents a second process from writing there.",
                file=sys.stderr,
            )

        # The name of this process, for the message of the next one
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since "
            f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n"
        )
        file.flush()
        yield
