"""Every kind of bad record, in real files: counted, named, replaced and limited."""

import dataclasses
import functools
import io
import json
import os
import re
import shutil
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from vdx.data import containers, records
from vdx.data.bad_records import read_bad_records
from vdx.data.checksums import add_checksums
from vdx.data.pipeline import DataError, make_loader
from vdx.data.record import BadRecord
from vdx.data.sources import Records, VideoFolder
from vdx.data.transforms import ClipSampling, to_example
from vdx.generate.video_io import write_video

CLIPS, BAD, BATCH, COUNT = 12, (3, 8), 8, 4


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Write a folder of good videos with checksums; each caption is the grey level."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for i in range(CLIPS):
        frames = 20 * i + rng.integers(0, 8, (24, 32, 32, 1), np.uint8)
        write_video(folder / f"{i}.mp4", frames.repeat(3, -1).astype(np.uint8), 12, min_side=32)
    write_rows(folder, [{"file_name": f"{i}.mp4", "caption": str(20 * i)} for i in range(CLIPS)])
    add_checksums(folder)
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    """Write cached latents, among them bad ones, which vdx itself refuses to write."""
    root = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    features = records.latent_features((None, 4, 4, 3), 6)
    metadata = {"latents": [2, 4, 4, 3], "text": [5, 6]}
    for kind in ("good", *LATENT_FAULTS):
        rows = []
        for i in range(CLIPS):
            row = {
                "latents": rng.normal(size=(2, 4, 4, 3)).astype(np.float16),
                "text": rng.normal(size=(1 + i % 5, 6)).astype(np.float16),
                "caption": f"clip {i}",
                "fps": 8.0,
                "num_frames": 5,
                "key": f"clip {i}",
            }
            rows.append({**row, **LATENT_FAULTS[kind](row)} if i in BAD and kind != "good" else row)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "check_latents", lambda *_: None)
            records.write_records(root / kind, {"train": rows}, features, metadata=metadata)
    return root


LATENT_FAULTS = {
    "NaN latents": lambda row: {"latents": row["latents"] * np.float16(np.nan)},
    "infinite text": lambda row: {"text": np.full((2, 6), np.inf, np.float16)},
    "latents of another shape": lambda row: {"latents": np.zeros((3, 4, 4, 3), np.float16)},
    "frame rate of zero": lambda row: {"fps": 0.0},
}


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def one_byte(data, place):
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def inverted(data):
    """Return the file with the middle half of its frames inverted."""
    begin, size = data.index(b"mdat"), len(data) - data.index(b"mdat")
    middle = slice(begin + size // 4, begin + 3 * size // 4)
    return data[: middle.start] + bytes(255 - b for b in data[middle]) + data[middle.stop :]


def as_file(change):
    """Return a fault of the file's bytes; the checksum, which would reveal it, is removed."""

    def fault(path, row):
        del row["sha256"]
        path.write_bytes(change(path.read_bytes()))

    return fault


def rewritten(frames, row, path, **options):
    del row["sha256"]
    write_video(path, frames, 12, **{"min_side": 32, **options})


def no_frames(path, row):
    del row["sha256"]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=12)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        out.start_encoding()


def changing_size(path, row):
    """Motion JPEG, each frame of which has its own size, in a file that is called mp4."""
    del row["sha256"]
    with av.open(str(path), "w", format="matroska") as out:
        stream = out.add_stream("mjpeg", rate=12)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p"
        out.start_encoding()
        for number in range(24):
            jpeg, side = io.BytesIO(), 32 if number < 12 else 48
            Image.new("RGB", (side, side)).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 12)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            out.mux(packet)


def a_pipe(path, row):
    del row["sha256"]
    path.unlink()
    os.mkfifo(path)


def relabelled(**changes):
    return lambda path, row: row.update(changes)


def grey(frames, side):
    return np.full((frames, side, side, 3), 90, np.uint8)


VIDEO_FAULTS = {
    "flipped bytes": (
        lambda p, row: p.write_bytes(one_byte(p.read_bytes(), -100)),
        "its SHA-256 is .* metadata.jsonl says",
    ),
    "damaged frames": (as_file(inverted), "damaged frame|Invalid data|do not decode"),
    "truncated": (as_file(lambda d: d[: len(d) // 2]), "truncated|Invalid data"),
    "empty": (as_file(lambda d: b""), "Invalid data"),
    "an unknown codec": (as_file(lambda d: d.replace(b"avc1", b"zzz9")), "an unknown codec"),
    "not a video": (as_file(lambda d: b"this is text\n" * 99), "Invalid data"),
    "a playlist": (as_file(lambda d: b"ffconcat version 1.0\nfile 1.mp4\n"), "not one of the cont"),
    "no frames": (no_frames, "no frames|no video stream"),
    "too short": (lambda p, row: rewritten(grey(4, 32), row, p), "too short: needs 1.33 s"),
    "too small": (
        lambda p, row: rewritten(grey(24, 8), row, p, min_side=8),
        "too small: 8x8 would be enlarged to cover 16x16",
    ),
    "changing size": (changing_size, "the frames change size: 32x32 then 48x48"),
    "missing file": (lambda p, row: p.unlink(), "No such file"),
    "a pipe": (a_pipe, "is a pipe; only regular files are read"),
    "caption not text": (relabelled(caption=["a", "b"]), "the caption is list, expected text"),
}


def tokenize(caption):
    return np.array([int(caption)]), np.array([True])


make = functools.partial(
    to_example, height=16, width=16, tokenize=tokenize, clip=ClipSampling(8, fps=6.0)
)


def loader(source, **settings):
    settings = {"global_batch": BATCH, "seed": 0, "max_bad_rate": 1.0, **settings}
    if isinstance(source, VideoFolder):
        settings |= {"to_example": make, "num_frames": (8,)}
    return make_loader(source, **settings)


def take(batches, count=COUNT):
    read = [next(batches) for _ in range(count)]
    batches.close()
    return read


def same(left, right):
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def on_hosts(source, count, **settings):
    shares = [
        take(loader(source, host_index=h, host_count=count, **settings)) for h in range(count)
    ]
    return [
        {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        for parts in zip(*shares, strict=True)
    ]


def keys(batches):
    return [key for batch in batches for key in batch["key"].tolist()]


def check(source, good, names, reason, log, counts=(2, 4)):
    """Check a source in which the records `names` are bad for `reason`."""
    batches = loader(source, bad_log=log)
    read = take(batches)
    # Counted and named, each with its reason.
    rows = read_bad_records(log)
    assert {row["key"] for row in rows} == set(names)
    assert len(rows) == batches.bad and batches.seen == BATCH * COUNT + batches.bad
    for row in rows:
        assert re.search(reason, row["reason"]), row
    # Replaced, and only they: every other place holds the clip that it holds in the good data.
    found, clean = keys(read), keys(take(loader(good)))
    assert not set(found) & set(names) and set(clean) & set(names) == set(names)
    assert all(a == b or b in names for a, b in zip(found, clean, strict=True))
    # The same on any number of hosts, whose files together have the same rows.
    for hosts in counts:
        again = log.with_name(f"{hosts}.jsonl")
        same(on_hosts(source, hosts, bad_log=again), read)
        found_rows = [{**row, "host": 0} for row in read_bad_records(again)]
        assert found_rows == rows
    # Above the rate the run stops, and names the records.
    with pytest.raises(DataError, match=f"(?s)records are bad.*({reason})") as stop:
        take(loader(source, max_bad_rate=0.0), 20)
    assert any(f"\n  {name}: " in str(stop.value) for name in names)
    return read


def spoilt(videos, folder, *faults):
    """Copy the folder, with one fault at the clips BAD or several at one clip each."""
    shutil.copytree(videos, folder)
    rows = read_rows(folder)
    places = dict.fromkeys(BAD, faults[0]) if len(faults) == 1 else dict(enumerate(faults))
    for place, fault in places.items():
        fault(folder / rows[place]["file_name"], rows[place])
    write_rows(folder, rows)
    return VideoFolder(str(folder))


@pytest.mark.parametrize("fault", VIDEO_FAULTS)
def test_a_bad_video_is_counted_named_replaced_and_limited(videos, tmp_path, fault):
    change, reason = VIDEO_FAULTS[fault]
    source = spoilt(videos, tmp_path / "spoilt", change)
    names = [f"{i}.mp4" for i in BAD]
    # Hosts replace a bad record by what it is refused with, whatever its fault is.
    hosts = (2, 4) if fault in ("flipped bytes", "too short") else ()
    read = check(source, VideoFolder(str(videos)), names, reason, tmp_path / "bad.jsonl", hosts)
    for batch in read:  # each caption came with its own clip
        np.testing.assert_allclose(batch["video"].mean((1, 2, 3, 4)), batch["text"][:, 0], atol=9)


def test_rows_without_a_caption_are_named_once_and_left_out(videos, tmp_path, caplog):
    source = spoilt(videos, tmp_path / "spoilt", lambda path, row: row.pop("caption"))
    read = take(loader(source, bad_log=tmp_path / "bad.jsonl", max_bad_rate=0.0))
    assert caplog.text.count("Not used: 2 rows without a caption (3.mp4, 8.mp4).") == 1
    assert not read_bad_records(tmp_path / "bad.jsonl")

    # The same batches as without these rows.
    shutil.copytree(videos, tmp_path / "fewer")
    rows = read_rows(videos)
    write_rows(tmp_path / "fewer", [row for i, row in enumerate(rows) if i not in BAD])
    same(read, take(loader(VideoFolder(str(tmp_path / "fewer")))))


@pytest.mark.parametrize("fault", [*LATENT_FAULTS, "rotten record"])
def test_a_bad_latent_is_counted_named_replaced_and_limited(latents, tmp_path, fault):
    good = Records(str(latents / "good"))
    if fault == "rotten record":
        shutil.copytree(latents / "good", tmp_path / "rotten")
        (shard,) = (tmp_path / "rotten").glob("*array_record*")
        data = shard.read_bytes()
        used = len(data[: 1 << 16].rstrip(b"\0"))  # the records, one after the other, are as long
        for i in BAD:
            data = one_byte(data, int((i + 0.5) / CLIPS * used))
        shard.write_bytes(data)
        source = Records(str(tmp_path / "rotten"))
        names = [f"{source.path}/train/{i}" for i in BAD]
        check(source, Renamed(good, names), names, "unreadable", tmp_path / "bad.jsonl")
    else:
        check(
            Records(str(latents / fault)),
            good,
            [f"clip {i}" for i in BAD],
            "latents|text|fps",
            tmp_path / "bad.jsonl",
        )


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Good records under the names that unreadable ones get."""

    source: Records
    names: list

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        row = self.source[index]
        return {**row, "key": self.names[BAD.index(index)]} if index in BAD else row


@pytest.mark.faults
def test_all_faults_at_once_are_replaced_equally_by_any_number_of_workers(videos, tmp_path):
    source = spoilt(
        videos,
        tmp_path / "spoilt",
        *(
            VIDEO_FAULTS[name][0]
            for name in (
                "flipped bytes",
                "truncated",
                "empty",
                "no frames",
                "too short",
                "changing size",
                "caption not text",
            )
        ),
    )
    read, log = take(loader(source)), tmp_path / "bad.jsonl"
    for workers, hosts in ((1, 1), (2, 2)):
        same(on_hosts(source, hosts, workers=workers, bad_log=log), read)
        logged = read_bad_records(log)
        assert {row["key"] for row in logged} == {f"{i}.mp4" for i in range(7)}
        log.unlink()


def test_every_flipped_byte_is_found_by_the_checksum_and_most_by_nothing_else(videos, tmp_path):
    folder = tmp_path / "spoilt"
    shutil.copytree(videos, folder)
    sealed, rng = VideoFolder(str(folder)), np.random.default_rng(0)
    write_rows(
        folder, [{k: v for k, v in row.items() if k != "sha256"} for row in read_rows(folder)]
    )
    bare = VideoFolder(str(folder))
    times, good = np.arange(24) / 12, [sealed[i].read(np.arange(24) / 12) for i in range(CLIPS)]

    def usable(source, index):
        """Return the pixels, or None if the record is refused."""
        try:
            return source[index].read(times)
        except BadRecord:
            return None

    found = silent = 0
    for trial in range(CLIPS):
        index = trial
        path = folder / f"{index}.mp4"
        data = path.read_bytes()
        path.write_bytes(one_byte(data, rng.integers(data.index(b"mdat") + 8, len(data))))
        found += usable(sealed, index) is None
        pixels = usable(bare, index)
        silent += pixels is not None and (pixels != good[index]).any()
        path.write_bytes(data)
        np.testing.assert_array_equal(usable(sealed, index), good[index])
    assert found == CLIPS and silent > 0, (found, silent)
    print(f"{silent} of {CLIPS} flipped bytes decode to other pixels without a sign")


def test_damage_of_any_kind_is_a_bad_record_or_undetected_but_never_stops_a_run(videos, tmp_path):
    data, rng = (videos / "5.mp4").read_bytes(), np.random.default_rng(1)
    write_rows(tmp_path, [{"file_name": "5.mp4", "caption": "x"}])
    source, refused = VideoFolder(str(tmp_path)), 0
    for trial in range(45):
        place, width = rng.integers(len(data) - 8), (1, 4, 8)[trial % 3]
        (tmp_path / "5.mp4").write_bytes(
            data[:place] + rng.bytes(width) + data[place + width :] if trial % 5 else data[:place]
        )
        try:
            record = source[0]
            record.read(record.timestamps)
        except BadRecord:
            refused += 1
    assert 11 < refused < 45


@pytest.mark.parametrize("name", ["concat:0.mp4", "subfile,,start,0,end,0,,:0.mp4", "file:0.mp4"])
def test_a_name_that_ffmpeg_takes_for_an_address_is_the_file_of_that_name(
    videos, monkeypatch, tmp_path, name
):
    shutil.copy(videos / "0.mp4", tmp_path / "0.mp4")
    shutil.copy(videos / "11.mp4", tmp_path / name)
    write_rows(tmp_path, [{"file_name": name, "caption": "x"}])
    monkeypatch.chdir(tmp_path)
    assert VideoFolder(".")[0].read(np.zeros(1)).mean() > 200


@pytest.mark.parametrize(
    "most, reason",
    [(1000, "frames of 32x32, more than 1000 pixels"), (1100, "Invalid|do not decode|damaged")],
)
def test_frames_that_would_take_all_memory_are_refused(tmp_path, monkeypatch, most, reason):
    changing_size(tmp_path / "a.mp4", {"sha256": None})  # 32x32 by its header, later 48x48
    write_rows(tmp_path, [{"file_name": "a.mp4", "caption": "x"}])
    monkeypatch.setattr(containers, "MOST_PIXELS", most)
    with pytest.raises(BadRecord, match=reason):
        VideoFolder(str(tmp_path))[0].read(np.arange(24) / 12)


@pytest.mark.parametrize(
    "file, key",
    [
        ("features.json", "pythonClassName"),
        ("features.json", "python_class_name"),
        ("features.json", "type"),
        ("dataset_info.json", "pythonClassName"),
    ],
)
def test_prepared_data_cannot_have_code_imported(latents, tmp_path, monkeypatch, file, key):
    shutil.copytree(latents / "good", tmp_path / "hostile")
    (tmp_path / "evil_module.py").write_text("raise SystemExit('code of a stranger ran')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "hostile" / file
    value = json.loads(path.read_text())
    feature = {key: "evil_module.Feature", "text": {}, "content": {}}
    if file == "features.json":
        value["featuresDict"]["features"]["caption"] = feature
        value = value if key != "type" else feature
    else:
        value["features"] = feature
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=rf"{file} names the class 'evil_module\.Feature'"):
        Records(str(tmp_path / "hostile"))
    assert "evil_module" not in sys.modules
