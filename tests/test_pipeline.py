"""Batches are a function of position alone; bad records are named, replaced and limited."""

import dataclasses
import functools
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from vdx.data.pipeline import DataError, _shuffled, make_loader
from vdx.data.record import BadRecord, Record
from vdx.data.sources import VideoFolder
from vdx.data.transforms import ClipSampling, to_example
from vdx.generate.video_io import write_video


@dataclasses.dataclass(frozen=True)
class Toy:
    """Records that know their index; those of `bad` cannot be read, nor can those of `broken`."""

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
        return Record(f"toy {index}", "", 9.0, None,
                      lambda t: np.full((len(t), 2, 2, 3), index % 256, np.uint8))


def simple(record, num_frames, rng):
    return {"video": record.read(np.arange(num_frames)), "key": record.key,
            "noise": rng.random(), "num_frames": np.int32(num_frames)}


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
    epochs = [found[i * 23:(i + 1) * 23] for i in range(5)]
    assert all(len(set(epoch)) == 23 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert keys(take(loader(shuffle=False), 6))[:23] == [f"toy {i}" for i in range(23)]
    assert keys(take(loader(seed=4, global_batch=23), 1)) != epochs[0]


def test_a_large_set_is_shuffled_whole_too():
    for epoch in (0, 1):
        order = [_shuffled(place, 70_000, 3, epoch) for place in range(70_000)]
        assert len(set(order)) == 70_000 and order[:100] != sorted(order[:100])


@pytest.mark.parametrize("settings", [{"threads": 1}, {"threads": 7, "prefetch": 5},
                                      {"threads": 2, "prefetch": 0}])
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
        same([next(batches)], reference[position:position + 1])
        assert batches.position == position + 1
    fresh = loader(Toy(bad=(5, 11)), num_frames=(2, 3))
    fresh.seek(4)
    same(take(fresh, 16), reference[4:])
    with pytest.raises(ValueError, match="negative"):
        batches.seek(-1)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_very_same_batches(reference, hosts):
    shares = [take(loader(Toy(bad=(5, 11)), num_frames=(2, 3), host_index=h, host_count=hosts), 20)
              for h in range(hosts)]
    joined = [{k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
              for parts in zip(*shares, strict=True)]
    same(joined, reference)


def test_a_batch_has_one_length_and_lengths_take_turns(reference):
    assert [b["video"].shape for b in reference[:3]] == [(4, 2, 2, 2, 3), (4, 3, 2, 2, 3),
                                                         (4, 2, 2, 2, 3)]
    assert reference[1]["num_frames"].tolist() == [3] * 4


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


@pytest.mark.parametrize("settings, message", [
    ({"global_batch": 6, "host_count": 4}, "cannot be shared by 4 hosts"),
    ({"global_batch": 0}, "global_batch = 0"), ({"host_index": 1}, r"not in 0 \.\. 0"),
    ({"num_frames": ()}, "positive lengths"), ({"num_frames": (0,)}, "positive lengths"),
    ({"workers": -1}, "cannot be negative"), ({"source": Toy(0)}, "The data set is empty: Toy")])
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loader(**settings)


def test_waiting_is_measured():
    batches = loader(Toy(jitter=0.02), threads=0)
    take(batches, 3)
    assert 0.02 < batches.wait_seconds < 1
    before = batches.wait_seconds
    time.sleep(0.05)
    assert batches.wait_seconds == before


def test_close_ends_the_threads_and_next_goes_on(reference):
    batches = loader(Toy(bad=(5, 11)), num_frames=(2, 3))
    first = take(batches, 3)
    batches.close()
    same(first + take(batches, 17), reference)


def planted_folder(folder: Path) -> str:
    """Twelve videos, five of which cannot be used, each for another reason."""
    rows = []
    for i in range(12):
        frames = np.full((4 if i == 9 else 24, 32, 32, 3), 20 * i, np.uint8)
        write_video(folder / f"{i}.mp4", frames, 12, min_side=32)
        rows.append({"file_name": f"{i}.mp4", "caption": None if i == 7 else f"{20 * i}"})
    data = (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").write_bytes(data[:len(data) // 2])
    (folder / "3.mp4").write_bytes(b"")
    (folder / "5.mp4").write_text("this is text")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_planted_faults_in_files_are_replaced_alike_everywhere(tmp_path):
    source = VideoFolder(planted_folder(tmp_path / "videos"))
    log = tmp_path / "bad.jsonl"

    def tokenize(caption):
        return np.array([int(caption)]), np.array([True])
    make = functools.partial(to_example, clip=ClipSampling(8, fps=6.0), height=16, width=16,
                             tokenize=tokenize)

    def read(**settings):
        settings = {"max_bad_rate": 1.0, **settings}
        return take(make_loader(source, to_example=make, num_frames=(8,), global_batch=6, seed=0,
                                **settings), 8)
    whole = read(bad_log=log)
    same(read(), whole)
    halves = [read(host_index=h, host_count=2) for h in range(2)]
    same([{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)],
         whole)
    reasons = {row["key"]: row["reason"] for row in map(json.loads, log.open())}
    assert reasons.keys() == {"1.mp4", "3.mp4", "5.mp4", "7.mp4", "9.mp4"}
    assert reasons["7.mp4"] == "the caption is missing"
    assert reasons["9.mp4"] == "too short: needs 1.33 s, has 0.333 s"
    for batch in whole:  # each caption came with its own clip
        np.testing.assert_allclose(batch["video"].mean((1, 2, 3, 4)), batch["text"][:, 0], atol=2)
    with pytest.raises(DataError, match="are bad"):
        read(max_bad_rate=0.05)
