"""From a source to batches: shuffled, bucketed, sharded over hosts, exactly resumable.

Everything is a pure function of the global position p, a count of examples since the start of
training: its epoch p // len(source), its place in that epoch's permutation, its random numbers
and its bucket. A batch therefore does not depend on threads, workers, hosts or interruptions,
and one integer, the number of batches consumed, is the whole state.
"""

import bisect
import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from grain.experimental import index_shuffle

from vdx.data import workers
from vdx.data.bad_records import read_bad_records
from vdx.data.record import BadRecord
from vdx.files import append_rows, host_file

ATTEMPTS = 9  # a record and up to 8 substitutes
MIN_SEEN = 50  # records before the share of bad ones is judged
_ENDLESS = 1 << 48
_SMALL = 1 << 16  # records whose permutation is kept in memory
_SHUFFLE, _EXAMPLE = 1, 2  # keep the two random streams of one seed apart

Example = dict[str, Any]


class DataError(ValueError):
    """The data set as a whole cannot be trained on: empty, or too many bad records."""


class Source(Protocol):
    """A data set: `source[i]` is a Record, or a dict that is a ready example."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Loader:
    """How batches are read; the section of a config.

    global_batch: examples in a batch, all hosts together.
    workers: processes that read and decode; 0 reads in threads of this process.
    threads: reading threads in each process; 0 reads when asked, which eases debugging.
    prefetch: batches read ahead.
    max_bad_rate: stop when clearly more than this share of the records is bad.
    buckets: (frames, height, width, examples) of the batches, which take turns, so that those of
      long, of tall and of wide clips have as many tokens as others. A record is cut to the bucket
      of its batch, whatever its own shape. Without them a batch has global_batch examples of the
      clip's usual size.
    """

    global_batch: int
    seed: int = 0
    shuffle: bool = True
    workers: int = 0
    threads: int = 4
    prefetch: int = 2
    max_bad_rate: float = 0.01
    buckets: tuple[tuple[int, int, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Bucket:
    """What is common to a batch. batch: examples, all hosts together; frames: None where ready
    examples say it; size: (height, width), empty where it is not for the batch to say."""

    batch: int
    frames: int | None = None
    size: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Bad:
    position: int
    attempt: int
    index: int
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class _Stream:
    """This host's examples from batch `start` on, as a random-access source for grain.

    Buckets take turns: batch k is of bucket k % len(buckets), whatever its clips are like.
    An item is (example or None, [_Bad]). A bad record travels in the item instead of being
    raised: grain skips what raises, and the consumer can count in order and without locks.
    """

    source: Source
    to_example: Callable[..., Example]
    loader: Loader
    buckets: tuple[_Bucket, ...]
    host_index: int
    host_count: int
    start: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, item: int) -> tuple[Example | None, list[_Bad]]:
        there = item * self.host_count + self.first(self.start)
        batch = self.holds(there)
        place = (there - self.first(batch)) // self.host_count
        position = self.first(batch) + self.host_index * self.share(batch) + place
        return self.at(position, self.bucket(batch))

    def bucket(self, batch: int) -> _Bucket:
        return self.buckets[batch % len(self.buckets)]

    def share(self, batch: int) -> int:
        """Examples of this host in a batch."""
        return self.bucket(batch).batch // self.host_count

    def first(self, batch: int) -> int:
        """The global position of the first example of a batch."""
        turns, rest = divmod(batch, len(self.buckets))
        ends = self._ends
        return turns * ends[-1] + (ends[rest - 1] if rest else 0)

    def holds(self, position: int) -> int:
        """The batch that holds a global position."""
        turns, rest = divmod(position, self._ends[-1])
        return turns * len(self.buckets) + bisect.bisect_right(self._ends, rest)

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(bucket.batch for bucket in self.buckets))

    def at(self, position: int, bucket: _Bucket) -> tuple[Example | None, list[_Bad]]:
        """The example at a global position, or a substitute that depends on it alone."""
        bad: list[_Bad] = []
        for attempt in range(ATTEMPTS if len(self.source) > 1 else 1):
            rng = np.random.default_rng([self.loader.seed, _EXAMPLE, position, attempt])
            index = self.index(position)
            if attempt:  # any other record than the first choice
                index = (index + 1 + int(rng.integers(len(self.source) - 1))) % len(self.source)
            try:
                return self.read(index, bucket, rng), bad
            except BadRecord as error:
                bad.append(_Bad(position, attempt, index, error.key, error.reason))
            except Exception as error:
                error.add_note(f"while reading record {index} for position {position}")
                raise
        return None, bad

    def index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.source))
        if not self.loader.shuffle:
            return place
        return _shuffled(place, len(self.source), self.loader.seed, epoch)

    def read(self, index: int, bucket: _Bucket, rng: np.random.Generator) -> Example:
        item, frames = self.source[index], bucket.frames
        if not isinstance(item, Mapping):
            size = dict(zip(("height", "width"), bucket.size, strict=False))
            return self.to_example(item, num_frames=frames, rng=rng, **size)
        if frames and "num_frames" in item and int(item["num_frames"]) != frames:
            raise BadRecord(
                str(item.get("key", index)),
                f"holds {int(item['num_frames'])} frames, this batch needs {frames}",
            )
        return dict(item)


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> tuple[int, np.ndarray | None]:
    """(seed, permutation) of an epoch; no permutation where it would take much memory."""
    entropy = np.random.SeedSequence([seed, _SHUFFLE, epoch])
    order = np.random.default_rng(entropy).permutation(size) if size <= _SMALL else None
    return int(entropy.generate_state(1)[0]), order


def _shuffled(place: int, size: int, seed: int, epoch: int) -> int:
    """Where the epoch's permutation of `size` records sends `place`."""
    seed, order = _order(size, seed, epoch)
    if order is not None:  # index_shuffle needs no memory, but milliseconds for a small set
        return int(order[place])
    return index_shuffle(place, max_index=size - 1, seed=seed, rounds=4)


class Batches:
    """An endless iterator of batches (dicts of arrays that share the leading axis).

    position: global batches consumed, the whole state; `seek` moves there.
    bad, seen: records of this host that were refused, and tried, in the batches consumed. After
      `seek` they are what `bad_log` tells of the batches before it, whichever host wrote it.
    last_keys: names the records of this host's share of the latest batch.
    wait_seconds: seconds spent inside next(), for the share of time lost to data.
    """

    def __init__(self, stream: _Stream, bad_log: Path | None):
        self._stream, self._bad_log = stream, bad_log
        self._items: Any = None
        self.position = self.bad = 0
        self.wait_seconds = 0.0
        self.last_keys: tuple[str, ...] = ()
        self._named: dict[str, str] = {}

    @property
    def seen(self) -> int:
        return self._stream.first(self.position) // self._stream.host_count + self.bad

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Example:
        begin = time.perf_counter()
        try:
            batch, bad = self._take()
        except BaseException as error:  # begin this batch again next time, rather than skip it
            self.close()
            if death := workers.died(error, self.position):
                raise death from error
            raise
        finally:
            self.wait_seconds += time.perf_counter() - begin
        self.position += 1
        self.bad += bad
        self.last_keys = tuple(map(str, batch.get("key", ())))
        return batch

    def seek(self, position: int) -> None:
        """Continues as if `position` batches had been consumed, whatever was read ahead."""
        if position < 0:
            raise ValueError(f"Position {position} is negative; it counts batches consumed.")
        self.close()
        self.position = position
        before = self._log_before()
        self.bad = len(before)
        self._named = {str(row.get("key")): str(row.get("reason")) for row in before}

    def samples(self) -> Iterator[tuple[int, Example]]:
        """(this host's examples in a batch, one example) of every kind of bucket, if there are
        several: what the batches will be like. Of a bucket whose first records are bad, none."""
        stream, kinds = self._stream, set(self._stream.buckets)
        for batch, bucket in enumerate(stream.buckets):
            if bucket in kinds and len(set(stream.buckets)) > 1:
                kinds.remove(bucket)
                if (example := stream.at(stream.first(batch), bucket)[0]) is not None:
                    yield stream.share(batch), example

    def close(self) -> None:
        """Ends reading ahead, its threads and worker processes; next() starts them again."""
        if self._items is not None:
            workers.close(self._items)
            self._items = None

    def _log_before(self) -> list[dict[str, Any]]:
        """What the log says of this host's share of the batches before the position."""
        stream = self._stream
        rows = [] if self._bad_log is None else read_bad_records(self._bad_log)

        def host(place: int) -> int:
            batch = stream.holds(place)
            return (place - stream.first(batch)) // stream.share(batch)

        return [
            row
            for row in rows
            if isinstance(place := row.get("position"), int)
            and place < stream.first(self.position)
            and host(place) == stream.host_index
        ]

    def _take(self) -> tuple[Example, int]:
        """(the next batch, records refused on its way)."""
        if self._items is None:
            self._items = _read_ahead(dataclasses.replace(self._stream, start=self.position))
        examples: list[Example] = []
        refused: list[_Bad] = []
        while len(examples) < self._stream.share(self.position):
            example, bad = next(self._items)
            refused += bad
            if example is None:
                self._report(refused)
                raise DataError(
                    f"No usable record in {len(bad)} tries at position "
                    f"{bad[0].position}:{_names({b.key: b.reason for b in bad})}"
                )
            examples.append(example)
        self._report(refused)
        self._judge(self.seen + len(examples) + len(refused), self.bad + len(refused))
        return _stack(examples), len(refused)

    def _judge(self, seen: int, bad: int) -> None:
        rate = self._stream.loader.max_bad_rate
        # Three standard deviations of grace: one bad record among the first 50 is not a rate.
        allowed = rate * seen + 3 * math.sqrt(rate * seen)
        if (seen >= MIN_SEEN or rate == 0) and bad > allowed:
            raise DataError(
                f"{bad} of {seen} records are bad, more than "
                f"max_bad_rate = {rate} allows. Mend or remove them, or raise "
                f"max_bad_rate:{_names(self._named)}"
            )

    def _report(self, refused: list[_Bad]) -> None:
        for one in refused:
            if one.key not in self._named:
                logging.warning("Bad record %s: %s", one.key, one.reason)
            self._named[one.key] = one.reason
        if self._bad_log is not None and refused:
            host = self._stream.host_index
            append_rows(
                host_file(self._bad_log, host),
                [dataclasses.asdict(one) | {"host": host} for one in refused],
            )


def make_loader(
    source: Source,
    *,
    to_example: Callable[..., Example] | None = None,
    num_frames: tuple[int, ...] | None = None,
    host_index: int = 0,
    host_count: int = 1,
    bad_log: str | Path | None = None,
    **settings,
) -> Batches:
    """Batches of this host's share of every global batch.

    to_example: `to_example(record, num_frames=, rng=)` -> dict of arrays of one example, with
      buckets also given height= and width=; may be left out for a source of ready examples.
    num_frames: the lengths of clips in frames; batch k has length num_frames[k % len];
      None where the source gives ready examples, of whatever length.
    host_index, host_count: host h has the h-th contiguous share of every global batch.
    bad_log: the JSON-lines file that names every bad record of host 0; see `bad_records`.
    settings: fields of Loader.

    Raises DataError for an empty source and ValueError for numbers that do not fit; next()
    raises DataError when too many records are bad, `workers.WorkerDied`, and whatever else
    reading raised.
    """
    loader = Loader(**settings)
    if (num_frames or to_example) and min(num_frames or (0,)) < 1:
        raise ValueError(f"num_frames = {num_frames}: give one or more positive lengths.")
    if any(min(bucket) < 1 for bucket in loader.buckets) or (loader.buckets and not to_example):
        raise ValueError(
            f"buckets = {loader.buckets}: positive frames, height, width and examples "
            "of clips that are cut from footage; ready examples keep their shape."
        )
    buckets = tuple(
        _Bucket(batch, frames, (height, width)) for frames, height, width, batch in loader.buckets
    ) or tuple(_Bucket(loader.global_batch, frames) for frames in num_frames or (None,))
    for batch in (bucket.batch for bucket in buckets):
        if batch < 1 or batch % host_count:
            name = "batch of a bucket" if loader.buckets else "global_batch"
            raise ValueError(
                f"{name} = {batch} cannot be shared by {host_count} hosts; make it a "
                f"multiple of {host_count}."
            )
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index = {host_index} is not in 0 .. {host_count - 1}.")
    if min(loader.seed, loader.workers, loader.threads, loader.prefetch) < 0:
        raise ValueError(f"seed, workers, threads and prefetch cannot be negative: {loader}.")
    if len(source) == 0:
        raise DataError(f"The data set is empty: {source!r:.500}.")
    stream = _Stream(
        source, to_example or _not_ready, loader, buckets, host_index, host_count, start=0
    )
    return Batches(stream, Path(bad_log) if bad_log is not None else None)


def _not_ready(record, **_):
    raise TypeError(f"The source gives {type(record).__name__}, not examples: pass to_example.")


def _read_ahead(stream: _Stream):
    """grain's iterator over a stream, in order, read ahead by threads or processes."""
    loader = stream.loader
    ahead = loader.prefetch * max(map(stream.share, range(len(stream.buckets))))
    dataset = grain.MapDataset.source(stream)
    if not loader.workers:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(loader.threads, ahead)))
    each = max(1, math.ceil(ahead / loader.workers))
    reading = grain.ReadOptions(loader.threads, min(loader.threads, each))
    return workers.with_workers(dataset.to_iter_dataset(reading), loader.workers, each)


def _stack(examples: list[Example]) -> Example:
    """One batch; raises DataError that names the example whose keys or shapes differ."""
    shapes = [{k: np.shape(v) for k, v in e.items()} for e in examples]
    for example, shape in zip(examples, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"Examples of one batch differ: {examples[0].get('key')} is "
                f"{shapes[0]}, {example.get('key')} is {shape}."
            )
    return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def _names(reasons: Mapping[str, str], most: int = 10) -> str:
    lines = [f"\n  {key}: {reason}" for key, reason in list(reasons.items())[:most]]
    return "".join(lines) + (f"\n  and {len(reasons) - most} more" if len(reasons) > most else "")
