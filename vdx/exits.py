"""The ends of programs: exit codes, last words, and Ctrl-C during imports.

The launch scripts start a run again after PREEMPTED and STUCK.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "PREEMPTED",
    "STUCK",
    "USAGE",
    "exit_at_interrupts",
    "exit_now",
    "raise_interrupts",
]

FAILED = 1  # an input, a file or the machine needs a person; the message says what
USAGE = 2  # flags or arguments are wrong
PREEMPTED = 42  # the state is saved, and the same command resumes
STUCK = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed
INTERRUPTED = 130  # Ctrl-C, as shells have it: 128 + SIGINT


def exit_now(code: int, message: str) -> NoReturn:
    """End the program at once, with a message as its last words.

    Python's own exit waits for the other processes, which wait in turn for this one, and has
    Orbax's threads print pages about a failed save.
    """
    sys.stdout.flush()
    print(f"\nvdx: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def exit_at_interrupts() -> None:
    """Let Ctrl-C end the program at once, unless the signal is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which removes half-written files."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    exit_now(INTERRUPTED, "interrupted.")
