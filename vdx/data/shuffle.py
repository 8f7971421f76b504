"""Permutations of a data set, a pure function of (size, seed, epoch)."""

import functools

import numpy as np
from grain.experimental import index_shuffle

__all__ = ["SHUFFLE_STREAM", "shuffled_index"]

SHUFFLE_STREAM = 1  # separates the random numbers of the order from those of the examples
MAX_STORED = 1 << 16  # records; a longer permutation is computed place by place, without memory


def shuffled_index(place: int, size: int, seed: int, epoch: int) -> int:
    """Return the record at a place of an epoch's permutation of `size` records."""
    shuffle_seed, permutation = _epoch_order(size, seed, epoch)
    if permutation is not None:
        return int(permutation[place])
    return index_shuffle(place, max_index=size - 1, seed=shuffle_seed, rounds=4)


@functools.lru_cache(maxsize=64)  # two epochs, which read-ahead may cross, of 32 buckets
def _epoch_order(size: int, seed: int, epoch: int) -> tuple[int, np.ndarray | None]:
    """Return the seed of an epoch, and its permutation [size] or None.

    Only the permutation of a small data set is stored.
    `index_shuffle` needs no memory, but takes milliseconds an index on a small data set.
    """
    entropy = np.random.SeedSequence([seed, SHUFFLE_STREAM, epoch])
    shuffle_seed = int(entropy.generate_state(1)[0])

    permutation = None
    if size <= MAX_STORED:
        permutation = np.random.default_rng(entropy).permutation(size)
    return shuffle_seed, permutation
