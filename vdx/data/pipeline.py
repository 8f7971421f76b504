"""Batches of a source: shuffled, bucketed, sharded over hosts, exactly resumable.

`vdx.data.stream` computes each example from its global position alone. This module reads ahead,
stacks examples to batches, counts bad records, and stops the run when they are too many. One
integer, the number of batches consumed, is the whole state.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from vdx.config.build import check_fields
from vdx.config.ranges import Count, Fraction, Index, Seed
from vdx.data import workers
from vdx.data.bad_records import read_bad_records
from vdx.data.stream import (
    BatchSchedule,
    BatchShape,
    Example,
    ExampleStream,
    RefusedRecord,
    Source,
    StreamItem,
)
from vdx.files import append_rows, host_file, printable

__all__ = ["Batches", "DataError", "Loader", "make_loader"]

MIN_SEEN = 50  # records before the rate of bad ones is checked; the rate of fewer says little
MAX_NAMED = 10  # bad records in an error message, which a reader can look through


class DataError(ValueError):
    """The data set as a whole cannot be trained on: empty, or too many bad records."""


@dataclasses.dataclass(frozen=True)
class Loader:
    """How batches are read; the section `data.loader` of a config."""

    global_batch: Count  # examples in a batch, all hosts together
    seed: Seed = 0
    shuffle: bool = True  # False: every epoch in the order of the source
    workers: Index = 0  # processes that read and decode; 0: threads of this process
    threads: Index = 4  # reading threads in each process; 0 reads inside next(), to debug
    prefetch: Index = 2  # batches read ahead: one is consumed while the next is read
    max_bad_rate: Fraction = 0.01  # the run stops when clearly more than this share is bad
    # (frames, height, width, examples) of the batches, in turn. Chosen so that batches of long,
    # tall and wide clips have about the same number of tokens. A record is cropped to the bucket
    # of its batch, whatever its own shape. Empty: global_batch clips of the usual size.
    buckets: tuple[tuple[Count, Count, Count, Count], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "config.data.loader")


class Batches:
    """An endless iterator of batches: dicts of arrays that share the leading axis.

    Its state is `position`; `seek` moves there.
    """

    position: int  # global batches consumed
    bad: int  # records of this host that were refused in the batches consumed
    wait_seconds: float  # seconds spent inside next(), for the share of time lost to data
    last_keys: tuple[str, ...]  # names of this host's records in the latest batch

    def __init__(self, stream: ExampleStream, loader: Loader, bad_log: Path | None) -> None:
        """Start at batch 0; `make_loader` checks the arguments."""
        self._stream = stream
        self._schedule = stream.schedule
        self._loader = loader
        self._bad_log = bad_log
        self._items: grain.DatasetIterator[StreamItem] | None = None  # None: not reading ahead
        self._reasons: dict[str, str] = {}  # of every bad record so far, by its key

        self.position = 0
        self.bad = 0
        self.wait_seconds = 0.0
        self.last_keys = ()

    @property
    def seen(self) -> int:
        """Records of this host that were tried for the batches consumed."""
        examples = self._schedule.first_position(self.position) // self._schedule.host_count
        return examples + self.bad

    def __iter__(self) -> "Batches":
        """Return itself."""
        return self

    def __next__(self) -> Example:
        """Return this host's share of the next batch."""
        begin = time.perf_counter()
        try:
            batch, num_refused = self._next_batch()
        except BaseException as error:
            self.close()  # so that the next call begins this batch again instead of skipping it
            if death := workers.died(error, self.position):
                raise death from error
            raise
        finally:
            self.wait_seconds += time.perf_counter() - begin

        self.position += 1
        self.bad += num_refused
        self.last_keys = tuple(map(str, batch.get("key", ())))
        return batch

    def seek(self, position: int) -> None:
        """Continue as if `position` batches had been consumed.

        Batches that were read ahead are dropped. The bad records of the batches before are
        counted from the log, whichever host wrote it.
        """
        if position < 0:
            raise ValueError(f"Position {position} is negative; it counts batches consumed.")
        self.close()
        self.position = position

        rows = self._logged_before_position()
        self.bad = len(rows)
        self._reasons = {str(row.get("key")): str(row.get("reason")) for row in rows}

    def samples(self) -> Iterator[tuple[int, Example]]:
        """Yield, for each kind of batch, this host's number of examples and one example.

        Programs are compiled for these shapes before training. Yields nothing if there is only
        one kind, and skips a kind whose first records are bad.
        """
        shapes = self._schedule.shapes
        if len(set(shapes)) == 1:
            return
        for shape in dict.fromkeys(shapes):
            batch = shapes.index(shape)
            example, _ = self._stream.at(self._schedule.first_position(batch), shape)
            if example is not None:
                yield self._schedule.host_share(batch), example

    def close(self) -> None:
        """Stop the threads and worker processes; next() starts them again."""
        if self._items is not None:
            workers.close(self._items)
            self._items = None

    def _next_batch(self) -> tuple[Example, int]:
        """Return the next batch, and the number of records refused on its way."""
        if self._items is None:
            stream = dataclasses.replace(self._stream, start=self.position)
            self._items = _read_ahead(stream, self._loader)

        # Items arrive in the order of the positions.
        examples: list[Example] = []
        refused: list[RefusedRecord] = []
        while len(examples) < self._schedule.host_share(self.position):
            example, bad = next(self._items)
            refused += bad
            if example is None:
                self._log_refused(refused)
                raise DataError(
                    f"No usable record in {len(bad)} tries at position {bad[0].position}:"
                    f"{_list_reasons({row.key: row.reason for row in bad})}"
                )
            examples.append(example)

        # Counts become public in __next__, once the batch is whole.
        self._log_refused(refused)
        self._check_bad_rate(
            seen=self.seen + len(examples) + len(refused), bad=self.bad + len(refused)
        )

        return _stack(examples), len(refused)

    def _check_bad_rate(self, seen: int, bad: int) -> None:
        """Raise DataError if clearly more than `max_bad_rate` of the records are bad."""
        rate = self._loader.max_bad_rate
        # Three standard deviations of a Poisson count above the mean: one bad record among the
        # first 50 is not yet a rate.
        allowed = rate * seen + 3 * math.sqrt(rate * seen)
        enough_seen = seen >= MIN_SEEN or rate == 0
        if enough_seen and bad > allowed:
            raise DataError(
                f"{bad} of {seen} records are bad, more than max_bad_rate = {rate} allows. "
                f"Mend or remove them, or raise max_bad_rate:{_list_reasons(self._reasons)}"
            )

    def _log_refused(self, refused: list[RefusedRecord]) -> None:
        """Warn once about each bad record, and append all refusals to the log."""
        for record in refused:
            if record.key not in self._reasons:
                logging.warning(
                    "Bad record %s: %s", printable(record.key), printable(record.reason)
                )
            self._reasons[record.key] = record.reason

        if self._bad_log is not None and refused:
            host = self._schedule.host_index
            rows = [dataclasses.asdict(record) | {"host": host} for record in refused]
            append_rows(host_file(self._bad_log, host), rows)

    def _logged_before_position(self) -> list[dict[str, Any]]:
        """Return the rows of the log for this host's share of the batches consumed."""
        if self._bad_log is None:
            return []
        end = self._schedule.first_position(self.position)

        def is_ours(row: dict[str, Any]) -> bool:
            position = row.get("position")
            if not isinstance(position, int) or position >= end:
                return False
            return self._schedule.host_of(position) == self._schedule.host_index

        return [row for row in read_bad_records(self._bad_log) if is_ours(row)]


def make_loader(
    source: Source,
    *,
    to_example: Callable[..., Example] | None = None,
    num_frames: tuple[int, ...] | None = None,
    host_index: int = 0,
    host_count: int = 1,
    bad_log: str | Path | None = None,
    **settings: Any,
) -> Batches:
    """Return the batches of a source: this host's share of every global batch.

    to_example: `to_example(record, num_frames=, rng=)` returns a dict of arrays of one example.
      With buckets it also takes height= and width=. A source of ready examples needs none.
    num_frames: lengths of clips in frames; batch k has length num_frames[k % len(num_frames)].
      None for ready examples of any length.
    host_index, host_count: host h has the h-th contiguous share of every global batch.
    bad_log: the JSON-lines file that names every bad record of host 0; see `bad_records`.
    settings: fields of Loader.

    Raises DataError for an empty source and ValueError for numbers that do not fit. next() raises
    DataError when too many records are bad, `workers.WorkerDied`, and any other error of reading.
    """
    # Every number is checked before anything is read.
    loader = Loader(**settings)
    shapes = _batch_shapes(loader, num_frames, to_example is not None)
    _check_hosts(loader, shapes, host_index, host_count)
    if len(source) == 0:
        raise DataError(f"The data set is empty: {source!r:.500}.")

    # From positions to examples to batches.
    stream = ExampleStream(
        source=source,
        to_example=to_example or _refuse_record,
        schedule=BatchSchedule(shapes, host_index, host_count),
        seed=loader.seed,
        shuffle=loader.shuffle,
    )
    return Batches(stream, loader, Path(bad_log) if bad_log is not None else None)


def _batch_shapes(
    loader: Loader, num_frames: tuple[int, ...] | None, cuts_clips: bool
) -> tuple[BatchShape, ...]:
    """Return the shapes of the batches, in turn.

    Raises ValueError for numbers that do not fit.
    """
    # Clips that are cut from footage need lengths; ready examples may do without.
    if (num_frames or cuts_clips) and min(num_frames or (0,)) < 1:
        raise ValueError(f"num_frames = {num_frames}: give one or more positive lengths.")
    if loader.buckets and not cuts_clips:
        raise ValueError(
            f"buckets = {loader.buckets} are of clips that are cut from footage; ready examples "
            "keep their shape."
        )

    if loader.buckets:
        return tuple(
            BatchShape(batch, frames, (height, width))
            for frames, height, width, batch in loader.buckets
        )
    return tuple(BatchShape(loader.global_batch, frames) for frames in num_frames or (None,))


def _check_hosts(
    loader: Loader, shapes: tuple[BatchShape, ...], host_index: int, host_count: int
) -> None:
    """Raise ValueError if a batch does not divide over the hosts.

    Also if there is no such host.
    """
    name = "batch of a bucket" if loader.buckets else "global_batch"
    for shape in shapes:
        if shape.batch % host_count:
            raise ValueError(
                f"{name} = {shape.batch} cannot be shared by {host_count} hosts; make it a "
                f"multiple of {host_count}."
            )
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index = {host_index} is not in 0 .. {host_count - 1}.")


def _refuse_record(record: Any, **_: Any) -> Example:
    """Raise TypeError: without `to_example` the source must give ready examples."""
    raise TypeError(f"The source gives {type(record).__name__}, not examples: pass to_example.")


def _read_ahead(stream: ExampleStream, loader: Loader) -> grain.DatasetIterator[StreamItem]:
    """Return an iterator over a stream, in order, read by threads or processes."""
    schedule = stream.schedule
    largest_share = max(map(schedule.host_share, range(len(schedule.shapes))))
    buffer = loader.prefetch * largest_share  # examples

    # Threads of this process.
    dataset = grain.MapDataset.source(stream)
    if not loader.workers:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(loader.threads, buffer)))

    # Processes, each with its threads and its part of the buffer.
    buffer_per_worker = max(1, math.ceil(buffer / loader.workers))
    reading = grain.ReadOptions(loader.threads, min(loader.threads, buffer_per_worker))
    return workers.with_workers(dataset.to_iter_dataset(reading), loader.workers, buffer_per_worker)


def _stack(examples: list[Example]) -> Example:
    """Return one batch; raises DataError if keys or shapes of examples differ."""
    # The first example decides.
    first = examples[0]
    expected = {name: np.shape(value) for name, value in first.items()}
    for example in examples:
        shapes = {name: np.shape(value) for name, value in example.items()}
        if shapes != expected:
            raise DataError(
                f"Examples of one batch differ: {first.get('key')} is {expected}, "
                f"{example.get('key')} is {shapes}."
            )
    return {name: np.stack([example[name] for example in examples]) for name in first}


def _list_reasons(reasons: Mapping[str, str]) -> str:
    """Return bad records and reasons, a line each, the first MAX_NAMED of them."""
    lines = [f"\n  {key}: {reason}" for key, reason in list(reasons.items())[:MAX_NAMED]]
    if len(reasons) > MAX_NAMED:
        lines.append(f"\n  and {len(reasons) - MAX_NAMED} more")
    return "".join(lines)
