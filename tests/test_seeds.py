"""Keys of seeds with 64 bits."""

import jax
import numpy as np
import pytest

from vdx.seeds import seed_key, seed_keys, seed_words

SMALL = [0, 1, 5, 2**31 - 1, 2**31, 2**32 - 1]
LARGE = [2**32, 2**32 + 5, 2**63 - 1, 2**63, 6281196413871203325, 2**64 - 1]


@pytest.mark.parametrize("seed", SMALL)
def test_small_seeds_have_the_key_of_jax(seed):
    want = jax.random.key_data(jax.random.key(np.uint32(seed)))
    np.testing.assert_array_equal(jax.random.key_data(seed_key(seed)), want)
    np.testing.assert_array_equal(seed_words([seed]), [want])


def test_every_bit_of_a_seed_counts():
    seeds = SMALL + LARGE + [1 << bit for bit in range(2, 64)]
    seeds = sorted(set(seeds))
    draws = np.asarray(jax.vmap(lambda key: jax.random.bits(key))(seed_keys(seed_words(seeds))))
    assert len(set(draws.tolist())) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_other_seeds_have_no_key(seed):
    with pytest.raises(OverflowError):
        seed_key(seed)
