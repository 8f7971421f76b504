"""Records written and read back without TensorFlow or torch, and rows that do not fit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vdx.data.record import BadRecord
from vdx.data.records import check_latents, ready_example

META = {"latents": [2, 4, 4, 3], "text": [5, 6]}
BLOCKED = """
import builtins
original = builtins.__import__
def refuse(name, *rest, **named):
    if name.split(".")[0] in ("torch", "tensorflow"):
        raise ModuleNotFoundError(f"{name} is blocked in this test")
    return original(name, *rest, **named)
builtins.__import__ = refuse
"""
ROUND_TRIP = (
    BLOCKED
    + """
import pickle, sys
from pathlib import Path
import numpy as np
from vdx.data.records import latent_features, video_features, write_records
from vdx.data.pipeline import make_loader
from vdx.data.record import BadRecord
from vdx.data.sources import Records
from vdx.generate.video_io import write_video

root = Path(sys.argv[1])
rng = np.random.default_rng(0)
meta = {"latents": [2, 4, 4, 3], "text": [5, 6], "encoder": "a fingerprint"}
rows = [{"latents": rng.normal(size=(2, 4, 4, 3)).astype(np.float16),
         "text": rng.normal(size=(i % 6, 6)).astype(np.float32), "caption": f"ein Würfel {i}",
         "fps": 8.0 + i, "num_frames": 5, "key": f"clip {i}"} for i in range(11)]
features = latent_features((2, 4, 4, 3), 6)
write_records(root / "latents", {"train": rows[:9], "validation": iter(rows[9:])}, features,
              shards=2, metadata=meta)
for split, expected in (("train", rows[:9]), ("validation", rows[9:])):
    source = pickle.loads(pickle.dumps(Records(str(root / "latents"), split)))
    assert len(source) == len(expected) and source.metadata == meta
    for row, read in zip(expected, (source[i] for i in range(len(source)))):
        length = len(row["text"])
        assert read["key"] == row["key"] and read["fps"] == np.float32(row["fps"])
        assert read["latents"].dtype == np.float16 and (read["latents"] == row["latents"]).all()
        assert read["text_mask"].tolist() == [True] * length + [False] * (5 - length)
        assert (read["text"][:length] == row["text"].astype(np.float16)).all()
        assert read["text"].shape == (5, 6) and not read["text"][length:].any()
batch = next(make_loader(Records(str(root / "latents")), global_batch=4))
assert batch["latents"].shape == (4, 2, 4, 4, 3) and batch["text"].shape == (4, 5, 6)
assert batch["num_frames"].dtype == np.int32 and batch["key"].shape == (4,)

for spoil, path in ((np.nan, root / "nan"), (0.0, root / "latents")):
    spoilt = [{**rows[0], "latents": rows[0]["latents"] * spoil}]
    try:
        write_records(path, {"train": spoilt}, features, metadata=meta)
        raise SystemExit(f"{path} was written")
    except ValueError as error:
        print(error)
assert sorted(p.name for p in root.iterdir()) == ["latents"], list(root.iterdir())

frames = np.full((6, 32, 32, 3), 90, np.uint8)
write_video(root / "a.mp4", frames, 12)
good = (root / "a.mp4").read_bytes()
videos = [{"video": data, "caption": "grey ä", "key": f"v{i}"}
          for i, data in enumerate((good, good[:200]))]
write_records(root / "videos", {"train": videos}, video_features())
record = Records(str(root / "videos"))[0]
assert record.caption == "grey ä" and record.key == "v0"
assert np.allclose(record.timestamps, np.arange(6) / 12)
assert abs(record.read(record.timestamps).astype(int) - 90).max() <= 2
try:
    Records(str(root / "videos"))[1]
    raise SystemExit("a truncated video was read")
except BadRecord as error:
    print(error)
for shard in (root / "videos").glob("*array_record*"):  # a bit that rots on disk
    data = bytearray(shard.read_bytes())
    data[160] ^= 1  # inside the first chunk
    shard.write_bytes(data)
try:
    Records(str(root / "videos"))[0]
    raise SystemExit("a rotten record was read")
except BadRecord as error:
    print(error)
assert not {"torch", "tensorflow"} & set(sys.modules)
print("round trip done")
"""
)


def test_records_round_trip_without_tensorflow_or_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP, str(tmp_path)],
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "round trip done",
        "clip 0: latents hold NaN",
        "is already there",
        "v1: not a usable video",
        "unreadable",
    ):
        assert line in done.stdout, done.stdout


def row(**changes):
    return {
        "latents": np.zeros((2, 4, 4, 3), np.float16),
        "text": np.zeros((3, 6), np.float16),
        "fps": 8.0,
        "num_frames": 5,
        **changes,
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents": np.zeros((2, 4, 8, 3))}, r"shape \(2, 4, 8, 3\), expected \(2, 4, 4, 3\)"),
        ({"latents": np.zeros((4, 4, 3))}, r"shape \(4, 4, 3\), expected"),
        ({"latents": np.full((2, 4, 4, 3), np.nan)}, "latents hold NaN"),
        ({"text": np.full((3, 6), np.inf)}, "text hold NaN"),
        ({"text": np.zeros((3, 7))}, r"text has the shape \(3, 7\), expected \(l, 6\)"),
        ({"text": np.zeros((6, 6))}, "text has 6 tokens, at most 5"),
        ({"concat": np.zeros((2, 4, 8, 5))}, r"concat have the shape \(2, 4, 8, 5\), expected"),
        ({"image_tokens": np.full((7, 3), np.nan)}, "image_tokens hold NaN"),
        ({"fps": 0.0}, "fps = 0.0"),
        ({"num_frames": 0}, "num_frames = 0"),
    ],
)
def test_a_row_that_does_not_fit_is_an_error_with_the_expected_shape(changes, message):
    with pytest.raises(BadRecord, match=f"k: .*{message}"):
        ready_example(row(**changes), "k", {**META, "concat": [2, 4, 4, 5]})


def test_overflow_of_float16_is_refused_before_writing():
    with pytest.raises(BadRecord, match="infinity, in float16"), np.errstate(over="ignore"):
        check_latents(row(latents=np.full((2, 4, 4, 3), 1e6)), "k", {})


def test_a_dimension_may_vary_and_metadata_may_be_absent():
    check_latents(row(latents=np.zeros((9, 4, 4, 3))), "k", {**META, "latents": [None, 4, 4, 3]})
    made = ready_example(row(), "k", {})
    assert made["text"].shape == (3, 6) and made["text_mask"].all()


def test_arrays_of_signals_are_in_the_example():
    made = ready_example(row(concat=np.ones((2, 4, 4, 5), np.float16)), "k", META)
    assert made["concat"].shape == (2, 4, 4, 5) and "image_tokens" not in made
