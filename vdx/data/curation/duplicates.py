"""Near-duplicates among clips, across files and inside them.

A near-duplicate is re-encoded, resized or mirrored.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vdx.data.curation.fingerprint import MIRROR, RATE

__all__ = ["Hashed", "distance", "find_duplicates"]

LEAST_HASHES = RATE  # of the overlap of two clips
LEAST_OVERLAP = 0.75  # of the shorter clip
BANDS = 4  # of the bits of a hash; clips that agree in all bits of one band are compared


class Hashed(NamedTuple):
    """A clip and its hashes."""

    hashes: np.ndarray  # uint64 [n], as `fingerprint.hashes_between` returns them
    shot: tuple[str, int]  # pieces of one shot are not compared


def find_duplicates(clips: Sequence[Hashed], limit: float) -> list[int | None]:
    """Return for each clip the earlier one that it repeats, or None.

    clips: the preferred ones first. Only clips that share a band of bits are compared, so the
    time is not quadratic in their number.
    """
    found: list[int | None] = [None] * len(clips)
    for earlier, later in sorted(_candidates(clips)):
        if found[later] is not None or found[earlier] is not None:
            continue
        if clips[earlier].shot == clips[later].shot:
            continue
        if distance(clips[earlier].hashes, clips[later].hashes) <= limit:
            found[later] = earlier
    return found


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the smallest share of bits that differ, over shifts in time.

    One of the clips may be mirrored.

    first, second: uint64 [n]. 1 if they are too short to be compared.
    """
    shorter = min(len(first), len(second))
    overlap = max(LEAST_HASHES, int(np.ceil(LEAST_OVERLAP * shorter)))
    smallest = 1.0
    for shift in range(overlap - len(second), len(first) - overlap + 1):
        mine = first[max(shift, 0) : shift + len(second)]
        other = second[max(-shift, 0) : max(-shift, 0) + len(mine)]
        for mask in (np.uint64(0), MIRROR):
            smallest = min(smallest, float(np.bitwise_count(mine ^ other ^ mask).mean()) / 64)
    return smallest


def _candidates(clips: Sequence[Hashed]) -> set[tuple[int, int]]:
    """Return pairs of clips that agree in a band of bits, mirrored or not."""
    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS):
        plain = [(key, number, False) for number, key in _keys(clips, band, np.uint64(0))]
        mirrored = [(key, number, True) for number, key in _keys(clips, band, MIRROR)]
        for _, group in itertools.groupby(sorted(plain + mirrored), key=lambda row: row[0]):
            rows = list(group)
            as_they_are = [number for _, number, is_mirrored in rows if not is_mirrored]
            pairs |= {
                (min(one, number), max(one, number))
                for one in as_they_are
                for _, number, _ in rows
                if number != one
            }
    return pairs


def _keys(clips: Sequence[Hashed], band: int, mask: np.uint64) -> Iterator[tuple[int, int]]:
    """Yield (number of the clip, bits of a band) of all hashes.

    A band has every fourth bit, so that each has low and high frequencies.
    """
    bits = sum(1 << bit for bit in range(band, 64, BANDS))
    for number, clip in enumerate(clips):
        for key in np.unique((clip.hashes ^ mask) & np.uint64(bits)).tolist():
            yield number, key
