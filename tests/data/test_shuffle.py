"""Every epoch is a permutation, a pure function of (size, seed, epoch)."""

import pytest

from vdx.data.shuffle import MAX_STORED, shuffled_index


def epoch_of(size, seed, epoch):
    return [shuffled_index(place, size, seed, epoch) for place in range(size)]


@pytest.mark.parametrize("size", [1, 2, 23])
def test_a_small_set_is_permuted_in_another_order_each_epoch(size):
    orders = [epoch_of(size, 3, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert size < 23 or len({tuple(order) for order in orders}) == 3


def test_a_large_set_is_shuffled_whole_too():
    assert MAX_STORED < 70_000
    for epoch in (0, 1):
        order = epoch_of(70_000, 3, epoch)
        assert len(set(order)) == 70_000 and order[:100] != sorted(order[:100])


def test_a_known_order_does_not_change():
    """A changed order would silently change every training that is resumed."""
    assert epoch_of(8, 3, 1) == [5, 4, 3, 0, 2, 6, 1, 7]
    assert [shuffled_index(place, 100_000, 3, 1) for place in range(4)] == [
        11831,
        54220,
        66634,
        66177,
    ]
