"""Batches are a function of position alone; bad records are named, replaced and limited."""

import dataclasses
import json
import random
import time

import numpy as np
import pytest

from vdx.data.bad_records import read_bad_records
from vdx.data.pipeline import DataError, make_loader
from vdx.data.record import BadRecord, Record


@dataclasses.dataclass(frozen=True)
class Toy:
    """Records of flat frames; those of `bad` cannot be read, those of `broken` raise a bug."""

    size: int = 23
    bad: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    jitter: float = 0.0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(random.random() * self.jitter)
        if index in self.broken:
            raise RuntimeError("a bug")
        if index in self.bad:
            raise BadRecord(f"toy {index}", "planted")
        return Record(
            f"toy {index}",
            "",
            9.0,
            None,
            lambda t: np.full((len(t), 2, 2, 3), index % 256, np.uint8),
        )


def simple(record, num_frames, rng):
    return {
        "video": record.read(np.arange(num_frames)),
        "key": record.key,
        "noise": rng.random(),
        "num_frames": np.int32(num_frames),
    }


def loader(source=None, **settings):
    settings = {"global_batch": 4, "seed": 3, "num_frames": (2,), "max_bad_rate": 1.0, **settings}
    return make_loader(Toy() if source is None else source, to_example=simple, **settings)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def keys(batches):
    return [key for batch in batches for key in batch["key"].tolist()]


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def reference():
    """Twenty batches with two lengths and some bad records, read without threads."""
    return take(loader(Toy(bad=(5, 11)), num_frames=(2, 3), threads=0), 20)


def test_every_epoch_has_every_record_once_in_another_order():
    found = keys(take(loader(global_batch=5), 23))
    epochs = [found[i * 23 : (i + 1) * 23] for i in range(5)]
    assert all(len(set(epoch)) == 23 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert keys(take(loader(shuffle=False), 6))[:23] == [f"toy {i}" for i in range(23)]
    assert keys(take(loader(seed=4, global_batch=23), 1)) != epochs[0]


@pytest.mark.parametrize(
    "settings", [{"threads": 1}, {"threads": 7, "prefetch": 5}, {"threads": 2, "prefetch": 0}]
)
def test_threads_change_nothing(reference, settings):
    source = Toy(bad=(5, 11), jitter=0.002)
    same(take(loader(source, num_frames=(2, 3), **settings), 20), reference)


def test_worker_processes_change_nothing(reference):
    batches = loader(Toy(bad=(5, 11)), num_frames=(2, 3), workers=2)
    batches.seek(6)
    same(take(batches, 4), reference[6:10])
    batches.close()


def test_resume_is_exact_at_any_position(reference):
    batches = loader(Toy(bad=(5, 11)), num_frames=(2, 3))
    for position in (13, 0, 7, 19):
        batches.seek(position)
        assert batches.position == position
        same([next(batches)], reference[position : position + 1])
        assert batches.position == position + 1
    fresh = loader(Toy(bad=(5, 11)), num_frames=(2, 3))
    fresh.seek(4)
    same(take(fresh, 16), reference[4:])
    with pytest.raises(ValueError, match="negative"):
        batches.seek(-1)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_very_same_batches(reference, hosts):
    shares = [
        take(loader(Toy(bad=(5, 11)), num_frames=(2, 3), host_index=h, host_count=hosts), 20)
        for h in range(hosts)
    ]
    joined = [
        {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    same(joined, reference)


def test_a_batch_has_one_length_and_lengths_take_turns(reference):
    assert [b["video"].shape for b in reference[:3]] == [
        (4, 2, 2, 2, 3),
        (4, 3, 2, 2, 3),
        (4, 2, 2, 2, 3),
    ]
    assert reference[1]["num_frames"].tolist() == [3] * 4


BUCKETS = ((2, 4, 6, 4), (3, 2, 2, 8), (2, 4, 6, 4), (5, 3, 1, 12))


def sized(record, num_frames, height, width, rng):
    made = simple(record, num_frames, rng)
    return {
        **made,
        "video": np.broadcast_to(made["video"][:, :1, :1], (num_frames, height, width, 3)),
    }


def bucketed(**settings):
    return make_loader(
        Toy(bad=(5, 11)),
        to_example=sized,
        **{
            "global_batch": 1,
            "seed": 3,
            "num_frames": (9,),
            "max_bad_rate": 1.0,
            "buckets": BUCKETS,
            **settings,
        },
    )


def test_buckets_take_turns_and_share_the_epochs():
    batches = bucketed(threads=0)
    found = take(batches, 10)
    assert [b["video"].shape[:4] for b in found] == [
        (n, t, h, w) for t, h, w, n in (*BUCKETS, *BUCKETS, *BUCKETS[:2])
    ]
    plain = keys(take(loader(Toy(bad=(5, 11)), global_batch=4), 17))  # the same records
    assert keys(found) == plain and len(plain) == 68 == batches.seen - batches.bad
    kinds = [(n, example["video"].shape[:3]) for n, example in batches.samples()]
    assert kinds == [(n, (t, h, w)) for t, h, w, n in (BUCKETS[0], BUCKETS[1], BUCKETS[3])]
    assert not list(loader().samples())  # of one kind: the first batch says it


@pytest.mark.parametrize(
    "settings",
    [{"threads": 3}, pytest.param({"workers": 2}, marks=pytest.mark.slow)],
    ids=["threads", "workers"],
)
def test_buckets_resume_exactly_at_any_position(settings):
    whole, batches = take(bucketed(threads=0), 10), bucketed(**settings)
    for position in (7, 0, 3, 9, 2):
        batches.seek(position)
        same([next(batches)], whole[position : position + 1])
    batches.close()


def test_hosts_share_the_batches_of_buckets(tmp_path):
    whole = take(bucketed(threads=0), 9)
    log, shares = tmp_path / "bad.jsonl", []
    for h in range(4):
        batches = bucketed(host_index=h, host_count=4, bad_log=log)
        shares.append(take(batches, 9))
        assert batches.seen == 15 + batches.bad  # of 60
        before = batches.bad
        batches.seek(9)
        assert batches.bad == before
    same(
        [
            {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            for parts in zip(*shares, strict=True)
        ],
        whole,
    )
    one = bucketed(bad_log=log)
    one.seek(9)
    assert one.bad == len(read_bad_records(log)) > 3


def test_random_numbers_differ_between_examples_and_epochs():
    noise = np.concatenate([b["noise"] for b in take(loader(Toy(3)), 30)])
    assert len(set(noise.tolist())) == 120


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_data_set_smaller_than_a_batch_repeats(size):
    found = keys(take(loader(Toy(size), global_batch=6), 2))
    assert sorted(found) == sorted([f"toy {i}" for i in range(size)] * (12 // size))


def test_bad_records_are_counted_named_and_replaced(tmp_path, reference):
    log = tmp_path / "bad_records.jsonl"
    batches = loader(Toy(bad=(5, 11)), num_frames=(2, 3), bad_log=log)
    found = keys(take(batches, 20))
    assert found == keys(reference) and not {"toy 5", "toy 11"} & set(found)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == batches.bad and batches.seen == 80 + batches.bad
    assert {row["key"] for row in rows} == {"toy 5", "toy 11"}
    assert all(row["reason"] == "planted" and row["host"] == 0 for row in rows)
    clean = keys(take(loader(num_frames=(2, 3)), 20))  # only their own places are taken over
    assert all((a == b) or b in ("toy 5", "toy 11") for a, b in zip(found, clean, strict=True))
    substitutes = {a for a, b in zip(found, clean, strict=True) if a != b}
    assert len(substitutes) > 2


def test_too_many_bad_records_stop_the_run_by_name():
    source = Toy(400, bad=tuple(range(0, 400, 10)))  # one in ten
    batches = loader(source, max_bad_rate=0.02)
    with pytest.raises(DataError, match=r"(?s)of \d+ records are bad.*toy \d+0: planted") as stop:
        take(batches, 200)
    assert 50 <= batches.seen < 200 and "max_bad_rate = 0.02" in str(stop.value)
    with pytest.raises(DataError):  # and it stays stopped
        next(batches)
    take(loader(source, max_bad_rate=0.2), 200)
    with pytest.raises(DataError):
        take(loader(source, max_bad_rate=0.0), 20)


def test_counts_survive_a_resume_on_any_number_of_hosts(tmp_path):
    source = Toy(bad=(5, 11))

    def hosts(count, position, number):
        """Read `number` batches from a position; return (bad, seen) before and after."""
        found = []
        for h in range(count):
            batches = loader(
                source, bad_log=tmp_path / "bad_records.jsonl", host_index=h, host_count=count
            )
            batches.seek(position)
            before = batches.bad, batches.seen
            take(batches, number)
            found.append((before, (batches.bad, batches.seen)))
        return np.array(found).sum(0).tolist()

    [_, [bad, seen]] = hosts(1, 0, 20)
    assert bad > 4 and seen == 80 + bad
    for file in tmp_path.iterdir():
        file.unlink()
    [_, there] = hosts(2, 0, 13)  # killed after batch 13, the last save was at 10
    [before, then] = hosts(4, 10, 7)
    assert before[0] <= there[0] and before[1] == 40 + before[0]
    [before, after] = hosts(1, 17, 3)
    assert before == then and after == [bad, seen]
    names = sorted(p.name for p in tmp_path.iterdir())
    assert set(names) <= {"bad_records.jsonl", *(f"bad_records_{h}.jsonl" for h in range(1, 4))}
    assert len(names) > 1
    rows = read_bad_records(tmp_path / "bad_records.jsonl")
    assert len(rows) == bad and [r["position"] for r in rows] == sorted(r["position"] for r in rows)


def test_half_a_row_of_a_killed_run_costs_no_other(tmp_path):
    log = tmp_path / "bad.jsonl"
    log.write_text('{"position": 7, "attem')
    batches = loader(Toy(bad=(5, 11)), bad_log=log)
    take(batches, 6)
    assert len(read_bad_records(log)) == batches.bad > 1


def test_a_name_that_no_encoding_has_is_logged(tmp_path, caplog):
    class Odd(Toy):
        def __getitem__(self, index):
            if index == 2:
                raise BadRecord("clip \ud800", "planted")
            return super().__getitem__(index)

    take(loader(Odd(), bad_log=tmp_path / "bad.jsonl"), 6)
    assert {row["key"] for row in read_bad_records(tmp_path / "bad.jsonl")} == {"clip \ud800"}
    assert "clip \\ud800" in caplog.text and caplog.text.encode("utf-8")


def test_the_latest_batch_is_named():
    batches = loader(host_index=1, host_count=2)
    assert batches.last_keys == ()
    for _ in range(3):
        assert tuple(next(batches)["key"].tolist()) == batches.last_keys
        assert [type(key) for key in batches.last_keys] == [str] * 2


def test_one_bad_record_early_is_no_rate():
    batches = loader(Toy(1000, bad=(7,)), max_bad_rate=0.01, shuffle=False)
    take(batches, 500)
    assert batches.bad == 2


def test_a_data_set_of_bad_records_stops_at_once():
    with pytest.raises(DataError, match="No usable record in 9 tries at position 0"):
        next(loader(Toy(bad=tuple(range(23)))))
    with pytest.raises(DataError, match="No usable record in 1 tries"):
        next(loader(Toy(1, bad=(0,))))


@pytest.mark.parametrize("settings", [{}, {"threads": 0}])
def test_an_error_surfaces_and_no_batch_is_skipped(settings):
    batches = loader(Toy(broken=(9,)), shuffle=False, **settings)
    same(take(batches, 2), take(loader(shuffle=False), 2))
    for _ in range(2):  # the same batch fails again; it is not passed over
        with pytest.raises(RuntimeError, match="a bug") as error:
            next(batches)
        assert "record 9 for position 9" in error.value.__notes__[0]
        assert batches.position == 2


def test_examples_that_differ_in_shape_are_named():
    def ragged(record, num_frames, rng):
        return {"key": record.key, "text": np.zeros(3 if record.key == "toy 2" else 4)}

    batches = make_loader(Toy(), to_example=ragged, num_frames=(2,), global_batch=4, shuffle=False)
    with pytest.raises(DataError, match=r"differ: toy 0 .*\(4,\).* toy 2 is .*\(3,\)"):
        next(batches)


class Ready(Toy):
    def __getitem__(self, index):
        return {"latents": np.full((2, 4), index), "num_frames": np.int32(5), "key": str(index)}


def test_ready_examples_pass_through_and_their_length_is_checked():
    batch = next(make_loader(Ready(), global_batch=2))
    assert batch["latents"].shape == (2, 2, 4)
    assert next(make_loader(Ready(), global_batch=2, num_frames=(5,)))["key"].shape == (2,)
    with pytest.raises(DataError, match="holds 5 frames, this batch needs 9"):
        next(make_loader(Ready(), global_batch=2, num_frames=(9,)))
    with pytest.raises(TypeError, match="pass to_example"):
        next(make_loader(Toy(), global_batch=2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"global_batch": 6, "host_count": 4}, "cannot be shared by 4 hosts"),
        ({"global_batch": 0}, "global_batch = 0"),
        ({"host_index": 1}, r"not in 0 \.\. 0"),
        ({"num_frames": ()}, "positive lengths"),
        ({"num_frames": (0,)}, "positive lengths"),
        ({"buckets": ((2, 4, 4, 0),)}, "buckets = 0 is out of range"),
        ({"buckets": ((2, 4, 4, 6),), "host_count": 4}, "batch of a bucket = 6 cannot be shared"),
        ({"workers": -1}, "workers = -1 is out of range"),
        ({"source": Toy(0)}, "The data set is empty: Toy"),
    ],
)
def test_settings_that_are_not_valid_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loader(**settings)


def test_waiting_is_measured():
    batches = loader(Toy(jitter=0.02), threads=0)
    take(batches, 3)
    assert 0.02 < batches.wait_seconds < 1
    before = batches.wait_seconds
    time.sleep(0.05)
    assert batches.wait_seconds == before


def test_close_ends_the_threads_and_next_continues(reference):
    batches = loader(Toy(bad=(5, 11)), num_frames=(2, 3))
    first = take(batches, 3)
    batches.close()
    same(first + take(batches, 17), reference)
