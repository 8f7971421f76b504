"""The example at every global position, a pure function of position and seed.

A global position p counts examples since the start of training, all hosts together. It fixes the
epoch p // len(source), the place in the permutation of that epoch, the random numbers of the
example, and the shape of its batch. With buckets of clips each bucket counts its own positions and
has its own epochs. An example therefore does not depend on threads, workers, hosts or
interruptions.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vdx.data.record import BadRecord
from vdx.data.shuffle import shuffled_index

__all__ = [
    "BatchSchedule",
    "BatchShape",
    "Example",
    "ExampleStream",
    "RefusedRecord",
    "Source",
    "StreamItem",
]

ATTEMPTS = 9  # a record and up to 8 substitutes; more failures in a row are a broken data set
EXAMPLE_STREAM = 2  # separates the random numbers of the examples from those of the order
ENDLESS = 1 << 48  # length of a stream for grain; no training consumes as many examples

Example = dict[str, Any]


class Source(Protocol):
    """A data set: `source[i]` is a Record, or a dict that is a ready example."""

    def __len__(self) -> int:
        """Return the number of records."""

    def __getitem__(self, index: int, /) -> Any:
        """Return record `index`; raises BadRecord if that record cannot be used."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape that all examples of one batch share."""

    batch: int  # examples, all hosts together
    frames: int | None = None  # pixel frames; None: ready examples, of whatever length
    size: tuple[int, ...] = ()  # (height, width) in pixels; empty: the usual size of the clip


@dataclasses.dataclass(frozen=True)
class RefusedRecord:
    """One record that was refused, and the place where its example would have stood."""

    position: int  # global position
    attempt: int  # 0: the record of that position; 1 and more: substitutes
    index: int  # in the source
    key: str  # name of the record
    reason: str


# The example, None if every attempt failed; and the records that were refused on the way.
StreamItem = tuple[Example | None, list[RefusedRecord]]


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
    """Global positions of every batch, and the share of one host.

    Batch k has the shape shapes[k % len(shapes)]. Host h has the h-th contiguous share of every
    batch.
    """

    shapes: tuple[BatchShape, ...]  # taken in turn
    host_index: int
    host_count: int

    def shape(self, batch: int) -> BatchShape:
        """Return the shape of a batch."""
        return self.shapes[batch % len(self.shapes)]

    def host_share(self, batch: int) -> int:
        """Return the number of examples of each host in a batch."""
        return self.shape(batch).batch // self.host_count

    def first_position(self, batch: int) -> int:
        """Return the global position of the first example of a batch."""
        cycles, rest = divmod(batch, len(self.shapes))
        position = cycles * self._ends[-1]
        if rest:
            position += self._ends[rest - 1]
        return position

    def batch_of(self, position: int) -> int:
        """Return the batch that contains a global position."""
        cycles, rest = divmod(position, self._ends[-1])
        return cycles * len(self.shapes) + bisect.bisect_right(self._ends, rest)

    def position_in_bucket(self, position: int) -> int:
        """Return how many positions before this one are in batches of the same shape."""
        batch = self.batch_of(position)
        cycles, rest = divmod(batch, len(self.shapes))
        shape = self.shapes[rest]
        batches = cycles * self._batches[shape] + self._batches_before[rest]
        return batches * shape.batch + position - self.first_position(batch)

    def host_of(self, position: int) -> int:
        """Return the host whose share contains a global position."""
        batch = self.batch_of(position)
        return (position - self.first_position(batch)) // self.host_share(batch)

    def host_position(self, count: int) -> int:
        """Return the global position of this host's example number `count`."""
        # Every batch divides evenly over the hosts, so this position is in the batch wanted.
        position = count * self.host_count
        batch = self.batch_of(position)
        first = self.first_position(batch)

        place = (position - first) // self.host_count
        return first + self.host_index * self.host_share(batch) + place

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The positions, within one cycle of shapes, at which the batches end."""
        return list(itertools.accumulate(shape.batch for shape in self.shapes))

    @functools.cached_property
    def _batches(self) -> Mapping[BatchShape, int]:
        """The batches of each shape in one cycle."""
        return collections.Counter(self.shapes)

    @functools.cached_property
    def _batches_before(self) -> list[int]:
        """For each batch of one cycle, the batches of its shape before it."""
        counts: collections.Counter[BatchShape] = collections.Counter()
        before = []
        for shape in self.shapes:
            before.append(counts[shape])
            counts[shape] += 1
        return before


@dataclasses.dataclass(frozen=True)
class ExampleStream:
    """Examples of one host from batch `start` on, as a random-access source for grain.

    A bad record is an entry of the item instead of an exception. grain skips an item that raises,
    and the consumer counts bad records in order and without locks.
    """

    source: Source
    to_example: Callable[..., Example]  # to_example(record, num_frames=, rng=[, height=, width=])
    schedule: BatchSchedule
    seed: int
    shuffle: bool  # False: every epoch in the order of the source
    start: int = 0  # batch of item 0
    # Ascending indices of the records of each bucket; empty: every batch takes from all records.
    members: Mapping[BatchShape, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Return a number that no training reaches."""
        return ENDLESS

    def __getitem__(self, item: int) -> StreamItem:
        """Return this host's example number `item`, and the records refused for it."""
        schedule = self.schedule
        consumed = schedule.first_position(self.start) // schedule.host_count
        position = schedule.host_position(consumed + item)
        return self.at(position, schedule.shape(schedule.batch_of(position)))

    def at(self, position: int, shape: BatchShape) -> StreamItem:
        """Return the example at a global position, or a substitute.

        The substitute, too, depends on the position alone.
        """
        refused: list[RefusedRecord] = []
        size = len(self.source)

        # After a bad record, records drawn at random until one can be used.
        for attempt in range(ATTEMPTS if size > 1 else 1):
            rng = np.random.default_rng([self.seed, EXAMPLE_STREAM, position, attempt])
            index = self._record_index(position, shape)
            if attempt:
                index = self._substitute(index, attempt, shape, rng)

            try:
                return self._read(index, shape, rng), refused
            except BadRecord as error:
                refused.append(RefusedRecord(position, attempt, index, error.key, error.reason))
            except Exception as error:
                error.add_note(f"while reading record {index} for position {position}")
                raise
        return None, refused

    def _record_index(self, position: int, shape: BatchShape) -> int:
        """Return the record whose turn it is at a global position."""
        records: Sequence[int] | np.ndarray = range(len(self.source))
        if self.members:
            records = self.members[shape]
            position = self.schedule.position_in_bucket(position)

        epoch, place = divmod(position, len(records))
        if self.shuffle:
            place = shuffled_index(place, len(records), self.seed, epoch)
        return int(records[place])

    def _substitute(
        self, index: int, attempt: int, shape: BatchShape, rng: np.random.Generator
    ) -> int:
        """Return any record but `index`, of the same bucket while that may have another."""
        records: Sequence[int] | np.ndarray = self.members.get(shape, ())
        if len(records) <= attempt:
            records = range(len(self.source))
        place = bisect.bisect_left(records, index)
        return int(records[(place + 1 + int(rng.integers(len(records) - 1))) % len(records)])

    def _read(self, index: int, shape: BatchShape, rng: np.random.Generator) -> Example:
        """Return record `index` as an example of a shape."""
        item = self.source[index]
        if not isinstance(item, Mapping):
            size = dict(zip(("height", "width"), shape.size, strict=False))
            return self.to_example(item, num_frames=shape.frames, rng=rng, **size)

        if shape.frames and "num_frames" in item and int(item["num_frames"]) != shape.frames:
            raise BadRecord(
                str(item.get("key", index)),
                f"holds {int(item['num_frames'])} frames, this batch needs {shape.frames}",
            )
        return dict(item)
