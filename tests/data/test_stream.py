"""Batches partition the global positions, and hosts partition every batch."""

import pytest

from vdx.data.stream import BatchSchedule, BatchShape

SHAPES = (BatchShape(4, 2), BatchShape(8, 3), BatchShape(4, 2), BatchShape(12, 5))
COUNT = 10  # batches


def schedule(host_index=0, host_count=1):
    return BatchSchedule(SHAPES, host_index, host_count)


def test_batches_partition_the_positions():
    one, expected = schedule(), 0
    for batch in range(COUNT):
        assert one.first_position(batch) == expected
        size = one.shape(batch).batch
        assert {one.batch_of(p) for p in range(expected, expected + size)} == {batch}
        expected += size


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_have_contiguous_shares_of_every_batch(hosts):
    found = []
    for host in range(hosts):
        one, count = schedule(host, hosts), 0
        for batch in range(COUNT):
            first = one.first_position(batch) + host * one.host_share(batch)
            for place in range(one.host_share(batch)):
                position = one.host_position(count)
                assert position == first + place and one.host_of(position) == host
                found.append(position)
                count += 1
    assert sorted(found) == list(range(schedule().first_position(COUNT)))
