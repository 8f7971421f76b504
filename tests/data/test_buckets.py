"""Every clip is in the bucket nearest to it, and every bucket has its turns."""

import dataclasses
import json
import os
from fractions import Fraction

import numpy as np
import pytest

from tests.data.test_video_files import make_clip
from vdx.data.buckets import MAX_CYCLE, ClipShape, bucket_cycle, nearest_bucket, plan_buckets
from vdx.data.pipeline import DataError, make_loader
from vdx.data.record import BadRecord, Record
from vdx.data.sources import VideoFolder
from vdx.data.stream import BatchShape
from vdx.data.transforms import ClipSampling, to_example
from vdx.files import read_json, write_json

RNG = np.random.default_rng
SIDES = (16, 24, 32, 48, 64, 96, 128)
LENGTHS = (1, 5, 9, 17, 33)


def apart(one, other):
    """Return the ratio of two numbers, at least 1, exactly."""
    ratio = Fraction(one) / Fraction(other)
    return max(ratio, 1 / ratio)


def oracle(shape, buckets, clip):
    """Return the nearest of all buckets: those that fit, sieved three times."""
    left = [
        number
        for number, bucket in enumerate(buckets)
        if (clip.short != "error" or bucket.frames <= shape.frames)
        and (clip.small != "error" or np.all(np.array(bucket.size) <= shape[:2]))
    ]
    for measure in (
        lambda b: apart(Fraction(*b.size), Fraction(shape.height, shape.width)),
        lambda b: apart(b.size[0] * b.size[1], shape.height * shape.width),
        lambda b: apart(b.frames, shape.frames),
    ):
        least = min((measure(buckets[number]) for number in left), default=None)
        left = [number for number in left if measure(buckets[number]) == least]
    return left[0] if left else None


@pytest.mark.parametrize("short", ["error", "hold"])
@pytest.mark.parametrize("small", ["error", "enlarge"])
def test_the_nearest_bucket_is_that_of_brute_force(short, small):
    rng = RNG(0)
    clip = ClipSampling(8, fps=8.0, short=short, small=small)
    found = set()
    for _ in range(400):
        buckets = [
            BatchShape(4, int(rng.choice(LENGTHS)), tuple(map(int, rng.choice(SIDES, 2))))
            for _ in range(rng.integers(1, 9))
        ]
        shape = ClipShape(*map(int, rng.choice(SIDES, 2)), int(rng.choice(LENGTHS)))
        number = nearest_bucket(shape, buckets, clip)
        assert number == oracle(shape, buckets, clip)
        found.add(number)
    assert len(found) > 5 and (None in found) == ("error" in (short, small))


def test_examples_of_the_nearest_bucket():
    wide, tall, large = ((9, 64, 112), (9, 112, 64), (9, 128, 224))
    buckets = [BatchShape(4, frames, size) for frames, *size in (wide, tall, large, (5, 64, 112))]
    clip = ClipSampling(8, fps=8.0)
    chosen = lambda *shape: nearest_bucket(ClipShape(*shape), buckets, clip)
    assert chosen(720, 1280, 99) == 2 and chosen(1280, 720, 99) == 1
    assert chosen(100, 180, 99) == 0  # too small for the large one
    assert chosen(720, 1280, 8) == 3  # too short for all others
    assert chosen(720, 1280, 4) is None and chosen(60, 60, 99) is None


def test_turns_are_in_proportion_and_no_bucket_waits_longer_than_stated():
    rng = RNG(1)
    for _ in range(60):
        size = int(rng.integers(1, 7))
        clips = np.exp(rng.uniform(0, 7, size)).astype(int)
        batches = rng.integers(1, 17, size)
        cycle = np.array(bucket_cycle(clips.tolist(), batches.tolist()))
        turns = np.bincount(cycle, minlength=size)
        np.testing.assert_array_equal(turns, -(-clips // batches))
        for bucket in range(size):
            places = np.flatnonzero(np.concatenate([cycle, cycle]) == bucket)
            bound = sum(-(-turns[a] // turns[bucket]) for a in range(size) if a != bucket)
            assert (np.diff(places) - 1).max() <= bound


def test_a_cycle_of_a_large_set_is_bounded_and_starves_no_bucket():
    cycle = np.array(bucket_cycle([1, 3_000_000, 1_000_000], [16, 16, 16]))
    turns = np.bincount(cycle)
    assert len(cycle) <= MAX_CYCLE + 3 and turns[0] == 1
    assert abs(turns[1] / turns[2] - 3) < 0.01


@dataclasses.dataclass(frozen=True)
class Footage:
    """Records (height, width, frames) at 8 frames a second; those of `bad` do not decode."""

    shapes: tuple[tuple[int, int, int], ...]
    bad: tuple[int, ...] = ()

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        height, width, frames = self.shapes[index]
        stamps = np.arange(frames) / 8

        def read(times):
            if index in self.bad and times.any():
                raise BadRecord(str(index), "planted")
            return np.full((len(times), height, width, 3), index, np.uint8)

        return Record(str(index), "", frames / 8, stamps, read)


class Unread(Footage):
    """Footage of which no shape can be read."""

    def __getitem__(self, index):
        raise BadRecord(str(index), "planted")


WIDE = (8, 12, 20)
TALL = (12, 8, 20)
SHORT = (8, 12, 5)
SHAPES = (WIDE, TALL, WIDE, WIDE, SHORT, WIDE, TALL, WIDE, SHORT, WIDE, WIDE, TALL, WIDE, WIDE)
BUCKETS = ((16, 8, 12, 4), (16, 12, 8, 2), (4, 8, 12, 2))  # 9 wide clips, 3 tall, 2 short
CLIP = ClipSampling((16,), fps=8.0)


def example(record, num_frames, height, width, rng):
    """Return a training example of a record."""
    return to_example(
        record,
        clip=CLIP,
        height=height,
        width=width,
        tokenize=lambda caption: ([0], [True]),
        num_frames=num_frames,
        rng=rng,
    ) | {"drawn": rng.random()}


def loader(source=None, **settings):
    settings = {"global_batch": 1, "seed": 3, "buckets": BUCKETS, "max_bad_rate": 1.0, **settings}
    source = source or Footage(SHAPES)
    return make_loader(source, to_example=example, num_frames=(16,), clip=CLIP, **settings)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in one | other:
            np.testing.assert_array_equal(one[name], other[name])


def by_bucket(batches):
    """Return the keys of the clips that came in each shape, in order."""
    found = {}
    for batch in batches:
        found.setdefault(batch["video"].shape[1:4], []).extend(batch["key"].tolist())
    return found


def test_every_batch_has_clips_of_its_bucket_alone_and_every_epoch_each_once():
    found = by_bucket(take(loader(threads=0), 36))  # 3 + 2 + 1 batches a cycle
    assert len(found) == 3
    for bucket, shape in zip(BUCKETS, (WIDE, TALL, SHORT), strict=True):
        members = {str(i) for i, it in enumerate(SHAPES) if it == shape}
        keys = found[bucket[:3]]
        epochs = [keys[i : i + len(members)] for i in range(0, len(keys), len(members))]
        whole = [epoch for epoch in epochs if len(epoch) == len(members)]
        assert all(set(epoch) == members for epoch in whole) and len(whole) > 5
        assert len(members) < 3 or len({tuple(epoch) for epoch in whole}) > 1


@pytest.mark.parametrize(
    "settings",
    [{"threads": 3}, pytest.param({"workers": 2}, marks=pytest.mark.slow)],
    ids=["threads", "workers"],
)
def test_buckets_resume_exactly_at_any_position(settings):
    source = Footage(SHAPES, bad=(2, 6))
    whole, batches = take(loader(source, threads=0), 14), loader(source, **settings)
    for position in (7, 0, 13, 5, 11):
        batches.seek(position)
        same([next(batches)], whole[position : position + 1])
    batches.close()


def test_hosts_share_the_batches_of_buckets():
    source = Footage(SHAPES, bad=(2, 6))
    whole = take(loader(source, threads=0), 14)
    shares = [take(loader(source, threads=0, host_index=h, host_count=2), 14) for h in range(2)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    same(joined, whole)


def test_a_bad_record_is_replaced_by_one_of_its_bucket():
    wide, tall = (0, 2), (1, 6, 11)
    batches = loader(Footage(SHAPES, bad=(*wide, 6)), threads=0)
    found = by_bucket(take(batches, 24))
    assert batches.bad > 5
    assert set(found[16, 12, 8]) == {str(i) for i in tall} - {"6"}
    assert not {str(i) for i in wide} & set(found[16, 8, 12])
    assert {SHAPES[int(key)] for key in found[16, 8, 12]} == {WIDE}


def test_the_only_clip_of_a_bucket_does_not_stop_the_run_when_it_is_bad():
    batches = loader(Footage((TALL, *[(12, 12, 20)] * 6), bad=(0,)), threads=0)
    found = by_bucket(take(batches, 12))
    assert "0" not in {key for keys in found.values() for key in keys} and batches.bad > 0


def test_a_clip_that_fits_no_bucket_is_refused_with_the_reason():
    shapes = (*SHAPES, (8, 12, 3), (4, 6, 20))  # too short and too small for all
    batches = loader(Footage(shapes), threads=0)
    take(batches, 24)
    assert batches._reasons == {
        "14": "too short: needs 2 s, has 0.375 s",
        "15": "too small: 4x6 would be enlarged to cover 8x12",
    }
    with pytest.raises(DataError, match="too small"):
        next(loader(Footage(((4, 6, 20),) * 3), threads=0))


def test_empty_buckets_are_named_and_have_no_batches(caplog):
    batches = loader(Footage((WIDE, WIDE)), threads=0)
    assert set(by_bucket(take(batches, 9))) == {(16, 8, 12)}
    assert "no clip is nearest: 16x12x8, 4x8x12" in caplog.text
    assert not list(batches.samples())


def test_one_bucket_has_the_order_of_no_buckets():
    """A changed order would silently change every training that is resumed."""
    one = loader(buckets=((4, 8, 8, 5),), threads=0)
    plain = make_loader(
        Footage(SHAPES),
        to_example=lambda record, num_frames, rng: example(record, num_frames, 8, 8, rng),
        num_frames=(4,),
        global_batch=5,
        seed=3,
        threads=0,
    )
    same(take(one, 9), take(plain, 9))


def test_every_shape_is_compiled_ahead():
    kinds = [(count, one["video"].shape[:3]) for count, one in loader(threads=0).samples()]
    assert sorted(kinds) == sorted((n, (t, h, w)) for t, h, w, n in BUCKETS)


def test_shapes_are_read_once_and_kept_for_the_next_start(tmp_path):
    path = tmp_path / "clip_shapes.json"
    first = loader(threads=0, shapes_file=path)
    whole = take(first, 8)
    again = loader(Unread(SHAPES), threads=0, shapes_file=path)  # of another source: read again
    assert again._stream.members.keys() != first._stream.members.keys()

    take(loader(threads=0, shapes_file=path), 1)
    stored = read_json(path)
    stored["shapes"] = [None] * len(SHAPES)  # a file that is of this source is believed
    write_json(path, stored)
    assert len(loader(threads=0, shapes_file=path)._stream.members) == 1
    for rows in ([None], 3, [[8, 12]] * 14, [[0, 12, 20]] * 14, [["8", 12, 20]] * 14):
        write_json(path, {"identity": stored["identity"], "shapes": rows})
        same(take(loader(threads=0, shapes_file=path), 8), whole)


@pytest.mark.parametrize("change", ["size", "time", "target of a link"])
def test_a_file_replaced_under_its_name_is_read_again(tmp_path, change):
    """Its shape decides its bucket; the others are the same files."""
    root = tmp_path / "clips"
    root.mkdir()
    stored = tmp_path / "clip_shapes.json"
    for name in ("a.mp4", "b.mp4"):
        make_clip(tmp_path / name, np.arange(20) / 8, range(20))
        (root / name).symlink_to(tmp_path / name)
    rows = [{"file_name": name, "caption": name} for name in ("a.mp4", "b.mp4")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    buckets = [BatchShape(1, 16, (8, 8)), BatchShape(1, 4, (8, 8))]

    def members():
        plan = plan_buckets(VideoFolder(str(root)), buckets, CLIP, 1, stored)
        return {bucket.frames: found.tolist() for bucket, found in plan.members.items()}

    assert members() == {16: [0, 1]}
    before = stored.read_bytes()
    assert members() == {16: [0, 1]} and stored.read_bytes() == before

    facts = (tmp_path / "b.mp4").stat()
    make_clip(tmp_path / "new.mp4", np.arange(6) / 8, range(6))
    if change == "target of a link":
        (root / "b.mp4").unlink()
        (root / "b.mp4").symlink_to(tmp_path / "new.mp4")
    else:
        os.replace(tmp_path / "new.mp4", tmp_path / "b.mp4")
    if change == "size":  # as tools do that keep the times of files
        os.utime(tmp_path / "b.mp4", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    if change == "time":
        with (tmp_path / "b.mp4").open("ab") as file:
            file.write(bytes(facts.st_size - file.tell()))
        assert (tmp_path / "b.mp4").stat().st_size == facts.st_size
    assert members() == {16: [0], 4: [1]}
