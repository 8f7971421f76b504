"""One function over many items: in processes of this machine, or by Apache Beam.

A function of a stage takes a small item, such as a path, and returns a small JSON value; what is
large is written into the cache. So every runner gives the same results.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from vdx.extras import import_extra

__all__ = ["BEAM_FOLDER", "Beam", "Local", "Runner", "WorkerDied"]

BEAM_FOLDER = "beam"  # in the cache, of results on their way
Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerDied(Exception):
    """The process that worked on an item died: a decoder crashed, or memory ran out."""


class Runner(Protocol):
    """A way to evaluate a function over many items."""

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], what: str
    ) -> list[Result | WorkerDied]:
        """Return the results in the order of the items. what: names the work."""


@dataclasses.dataclass(frozen=True)
class Local:
    """Processes of this machine. A process that dies fails only its item."""

    workers: int = 1  # processes; 0: this one, where a crash ends everything

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], what: str
    ) -> list[Result | WorkerDied]:
        """Return the results in the order of the items, with a line of progress."""
        results: dict[int, Result | WorkerDied] = {}
        with tqdm(total=len(items), desc=what, unit="file", dynamic_ncols=True) as progress:
            for number, result in self._results(function, items):
                results[number] = result
                progress.update()
        return [results[number] for number in range(len(items))]

    def _results(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result | WorkerDied]]:
        """Yield (number, result) as they come."""
        if self.workers == 0 or not items:
            yield from ((number, function(item)) for number, item in enumerate(items))
            return

        left = set(range(len(items)))
        while left:
            # When a process dies, the whole pool ends, and several items may be the cause.
            for number, result in _pool_results(function, items, sorted(left), self.workers):
                left.remove(number)
                yield number, result

            # Those that had been started are among the first; one at a time shows which it was.
            suspects = sorted(left)[: 2 * self.workers + 2]
            while suspects:
                for number, result in _pool_results(function, items, suspects, 1):
                    left.remove(number)
                    yield number, result
                suspects = [number for number in suspects if number in left]
                if suspects:
                    left.remove(suspects[0])
                    yield suspects.pop(0), WorkerDied("the process that worked on it died")


def _pool_results(
    function: Callable[[Item], Result], items: Sequence[Item], numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (number, result) as they come, until a process dies.

    With one worker they come in order, and the next one is that at which it died.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of JAX halfway
    count = min(workers, len(numbers))
    pool = ProcessPoolExecutor(count, context, initializer=_end_with_parent)
    with _no_interrupts():
        for _ in range(count):  # each starts a process
            pool.submit(os.getpid)
    futures: dict[Future[Result], int] = {
        pool.submit(function, items[number]): number for number in numbers
    }
    order: Iterable[Future[Result]] = futures if workers == 1 else as_completed(futures)
    done = False
    try:
        for future in order:
            yield futures[future], future.result()
        done = True
    except BrokenProcessPool:
        done = True
    finally:
        pool.shutdown(wait=done, cancel_futures=True)  # an interrupt waits for no work


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Start processes that ignore interrupts: a terminal sends them to all processes.

    Only the main thread of a program can change what a signal does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_with_parent() -> None:
    """End this process when the one that started it ends, however that is."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class Beam:
    """A pipeline of Apache Beam: Create | Reshuffle | Map, over the same function.

    The items and the results are small. Every worker needs the footage and the cache at the same
    paths, so both are on a file system that all of them mount.
    """

    options: tuple[str, ...]  # flags of Beam, such as --runner=FlinkRunner
    scratch: Path  # a folder of its own that the workers share; results pass through it

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], what: str
    ) -> list[Result | WorkerDied]:
        """Return the results in the order of the items."""
        beam = import_extra("apache_beam", "beam")
        from apache_beam.options.pipeline_options import PipelineOptions

        if not items:
            return []
        print(f"{what}: {len(items)} items in Beam", flush=True)
        shutil.rmtree(self.scratch, ignore_errors=True)  # what a killed run has left
        self.scratch.mkdir(parents=True)
        prefix = self.scratch / "results"
        with beam.Pipeline(options=PipelineOptions(list(self.options))) as pipeline:
            (
                pipeline
                | beam.Create(list(enumerate(items)))
                | beam.Reshuffle()
                | beam.Map(_numbered, function)
                | beam.io.WriteToText(str(prefix), append_trailing_newlines=True)
            )

        results: dict[int, Result | WorkerDied] = {}
        for file in self.scratch.glob(f"{prefix.name}*"):
            for line in file.read_text().splitlines():
                number, result = json.loads(line)
                results[number] = result
        shutil.rmtree(self.scratch)
        return [results[number] for number in range(len(items))]


def _numbered(item: tuple[int, Any], function: Callable[[Any], Any]) -> str:
    """Return the result of a numbered item as one line of text."""
    number, value = item
    return json.dumps([number, function(value)])
