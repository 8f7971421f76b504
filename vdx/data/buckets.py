"""Buckets: batches of several shapes, each of the clips nearest to its shape.

One frame and the timestamps of every clip are read once, before training. A clip belongs to one
bucket from then on. Buckets take turns in a fixed cycle, in proportion to their clips.
`clip_shapes.json` in the workdir spares a resumed run the reading. It holds for these records,
with files of these sizes and times.
"""

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vdx.data.record import BadRecord, Record
from vdx.data.stream import BatchShape, Source
from vdx.data.transforms import ClipSampling
from vdx.files import read_json, write_json

__all__ = ["BucketPlan", "ClipShape", "bucket_cycle", "nearest_bucket", "plan_buckets"]

MAX_CYCLE = 4096  # batches; shares are then exact to 0.02 %, and a schedule stays small
CHUNK = 256  # clips that are read between two looks at the clock
PROGRESS = 10.0  # seconds between two lines of the log


class ClipShape(NamedTuple):
    """The largest clip that a record fills."""

    height: int  # pixels
    width: int  # pixels
    frames: int


class BucketPlan(NamedTuple):
    """The clips of every bucket, and the turns that buckets take."""

    members: dict[BatchShape, np.ndarray]  # ascending indices of records, at least one a bucket
    cycle: tuple[BatchShape, ...]  # shapes of consecutive batches, repeated without end


def plan_buckets(
    source: Source,
    buckets: Sequence[BatchShape],
    clip: ClipSampling,
    threads: int,
    stored: Path | None = None,
) -> BucketPlan:
    """Assign every record of a source to a bucket.

    Records that cannot be read or fit no bucket join the bucket with the most clips, where the
    pipeline refuses them with the reason. threads: records that are read at once. stored: a file
    of the shapes; written, or read if it is of this source.
    """
    identity = _identity(source, clip)
    shapes = _stored_shapes(stored, identity, len(source))
    if shapes is None:
        shapes = list(_read_shapes(source, clip, threads))
        if stored is not None:
            write_json(stored, {"identity": identity, "shapes": shapes})

    # The bucket of each record; -1: none.
    numbers = np.full(len(source), -1)
    for index, shape in enumerate(shapes):
        nearest = None if shape is None else nearest_bucket(shape, buckets, clip)
        if nearest is not None:
            numbers[index] = nearest

    counts = np.bincount(numbers[numbers >= 0], minlength=len(buckets))
    _log_counts(buckets, counts.tolist())
    numbers[numbers < 0] = np.argmax(counts)

    # Buckets without clips have no turn.
    members = {buckets[number]: np.flatnonzero(numbers == number) for number in np.unique(numbers)}
    used = list(members)
    cycle = bucket_cycle([len(members[shape]) for shape in used], [shape.batch for shape in used])
    return BucketPlan(members, tuple(used[number] for number in cycle))


def nearest_bucket(
    shape: ClipShape, buckets: Sequence[BatchShape], clip: ClipSampling
) -> int | None:
    """Return the number of the bucket nearest to a clip, or None.

    Only buckets that `clip` can fill count: not longer than the record unless short clips repeat,
    not larger than its frames unless small ones are enlarged. Of these the nearest has the
    least ratio of the aspect ratios, so that as little as possible is cropped; then of the areas,
    then of the lengths; then it is the first.
    """

    def fits(number: int) -> bool:
        frames, (height, width) = _clip_of(buckets[number])
        is_long = clip.short != "error" or shape.frames >= frames
        is_large = clip.small != "error" or (shape.height >= height and shape.width >= width)
        return is_long and is_large

    def distance(number: int) -> tuple[float, float, float]:
        frames, (height, width) = _clip_of(buckets[number])
        aspect = _ratio(width * shape.height, shape.width * height)
        area = _ratio(height * width, shape.height * shape.width)
        length = _ratio(frames, shape.frames)
        return aspect, area, length

    return min(filter(fits, range(len(buckets))), key=distance, default=None)


def bucket_cycle(clips: Sequence[int], batches: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of the buckets of consecutive batches, one cycle of them.

    clips: how many clips each bucket has, at least one. batches: clips of a batch of each bucket.

    A cycle has ceil(clips / batch) batches of a bucket, so that every clip comes at least once.
    Beyond MAX_CYCLE batches all of these are scaled down, to no less than one. They are evenly
    spaced: between two batches of bucket b, with n_b in the cycle, come at most
    sum over a of ceil(n_a / n_b) batches of other buckets a. No bucket waits longer.
    """
    turns = [math.ceil(count / batch) for count, batch in zip(clips, batches, strict=True)]
    if sum(turns) > MAX_CYCLE:
        turns = [max(1, count * MAX_CYCLE // sum(turns)) for count in turns]

    # Batch i of n stands in the middle of the i-th of n equal parts of the cycle.
    places = [
        (Fraction(2 * turn + 1, 2 * count), number)
        for number, count in enumerate(turns)
        for turn in range(count)
    ]
    return tuple(number for _, number in sorted(places))


def _ratio(one: int, other: int) -> float:
    """Return how many times the smaller of two numbers the larger is.

    Integers make equal ratios equal in every bit, so that ties are ties on every machine.
    """
    return max(one, other) / min(one, other)


def _clip_of(bucket: BatchShape) -> tuple[int, tuple[int, int]]:
    """Return (frames, (height, width)) of the clips of a bucket."""
    height, width = bucket.size
    assert bucket.frames is not None  # a bucket names all three
    return bucket.frames, (height, width)


def _identity(source: Source, clip: ClipSampling) -> str:
    """Return a digest of what the shapes depend on.

    It covers the records, their files, and how clips are cut. A file that was replaced under its
    name has another size or time. Procedural sources have no files.
    """
    names = getattr(source, "rows", None)
    stamps: list[Any] = getattr(source, "file_stamps", list)()
    facts = repr((source, len(source), names, stamps, clip))
    return hashlib.sha256(facts.encode()).hexdigest()


def _stored_shapes(path: Path | None, identity: str, count: int) -> list[ClipShape | None] | None:
    """Return the shapes of all records from a file; None unless it is of this source."""
    if path is None or not path.exists():
        return None
    found = read_json(path)
    rows = found.get("shapes") if isinstance(found, dict) else None
    if not isinstance(rows, list) or len(rows) != count or found.get("identity") != identity:
        return None
    if not all(row is None or _is_shape(row) for row in rows):
        return None
    return [None if row is None else ClipShape(*row) for row in rows]


def _is_shape(row: Any) -> bool:
    """Return true if a JSON value is a ClipShape."""
    return (
        isinstance(row, list)
        and len(row) == len(ClipShape._fields)
        and all(type(value) is int and value > 0 for value in row)
    )


def _read_shapes(source: Source, clip: ClipSampling, threads: int) -> Iterator[ClipShape | None]:
    """Yield the shape of every record in order; None for one that cannot be read."""

    def read(index: int) -> ClipShape | None:
        try:
            record: Record = source[index]
            height, width = record.read(np.zeros(1)).shape[1:3]
            return ClipShape(height, width, max(1, clip.frames_available(record)))
        except BadRecord:  # the pipeline counts and names it
            return None

    logged = time.monotonic()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, len(source), CHUNK):
            yield from pool.map(read, range(start, min(start + CHUNK, len(source))))
            if time.monotonic() - logged > PROGRESS:
                logged = time.monotonic()
                logging.info("Buckets: read the shapes of %d of %d clips.", start, len(source))


def _log_counts(buckets: Sequence[BatchShape], counts: Sequence[int]) -> None:
    """Log how many clips each bucket has."""
    named = [f"{bucket.frames}x{bucket.size[0]}x{bucket.size[1]}" for bucket in buckets]
    used = [f"{count} in {name}" for name, count in zip(named, counts, strict=True) if count]
    empty = [name for name, count in zip(named, counts, strict=True) if not count]
    logging.info("Buckets (frames x height x width): %s.", ", ".join(used) or "no clip fits")
    if empty:
        logging.warning("Buckets without batches, no clip is nearest: %s.", ", ".join(empty))
