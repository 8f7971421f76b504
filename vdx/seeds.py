"""Random keys of seeds with 64 bits.

`jax.random.key` has a key of 64 bits, and fills only the low half from a seed.
"""

from collections.abc import Iterable

import jax
import numpy as np

from vdx.types import Array, PRNGKeyArray

__all__ = ["seed_key", "seed_keys", "seed_words"]

IMPLEMENTATION = "threefry2x32"  # of JAX's default keys


def seed_words(seeds: Iterable[int]) -> np.ndarray:
    """Return the high and the low 32 bits of each seed, uint32 [n 2].

    A program takes seeds in this form: its integers have 32 bits.
    """
    return np.array([(int(seed) >> 32, int(seed) & 0xFFFFFFFF) for seed in seeds], np.uint32)


def seed_keys(words: np.ndarray | Array) -> PRNGKeyArray:
    """Return the key of each seed, [n], from `seed_words`.

    Below 2^32 it is `jax.random.key(seed)`.
    """
    return jax.random.wrap_key_data(words, impl=IMPLEMENTATION)


def seed_key(seed: int) -> PRNGKeyArray:
    """Return the key of a seed in [0, 2^64)."""
    return seed_keys(seed_words([seed]))[0]
