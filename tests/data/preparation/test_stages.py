"""From a folder to a data set; only what is new is done again."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from tests.kill_prepare import tree, write_footage
from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.preparation import stages
from vdx.data.preparation.runner import Local
from vdx.data.preparation.sources import list_sources
from vdx.data.sources import Folder, Records
from vdx.data.transforms import ClipSampling, to_example

SOURCES = 3
FRAMES = 18  # 1.5 seconds


def prepare(source, out, *overrides):
    """Run all stages in this process."""
    config = resolve("configs/prepare.py", [f"--config.{change}" for change in overrides])
    preparation = stages.Preparation(out, config, Local(0))
    sources = list_sources(source)
    looks = preparation.look(sources)
    rows = preparation.decide(looks, sources)
    preparation.encode_clips(rows, looks, sources)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """Write clips, a copy of one, half of one, and a file that is no video."""
    folder = tmp_path_factory.mktemp("footage")
    write_footage(folder, SOURCES, FRAMES)
    shutil.copy(folder / "0.mp4", folder / "copy.mp4")
    data = (folder / "1.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    (folder / "cut.txt").write_text("half")
    (folder / "notes.pdf").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def prepared(footage, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(footage, out, "shards.per_shard=2")
    (out / "prepare.json").write_text("{}")
    return out


def test_every_file_has_a_row(prepared, footage):
    found = {row["source"]: row for row in rows_of(prepared / "sources.jsonl")}
    names = {path.name for path in footage.iterdir() if path.suffix != ".txt"}
    assert found.keys() == names
    verdicts = {name: (row["verdict"], row["reasons"]) for name, row in found.items()}
    assert verdicts["0.mp4"] == ("ok", [])
    assert verdicts["copy.mp4"] == ("drop", ["duplicate"])
    assert verdicts["notes.pdf"] == ("drop", ["unreadable"])
    assert verdicts["cut.mp4"] == ("partial", ["truncated"])
    for row in rows_of(prepared / "clips.jsonl"):
        assert (row["verdict"] == "keep") == (row["reasons"] == [])


@pytest.mark.parametrize("split", ["all", "train", "validation"])
def test_the_records_are_the_kept_clips(prepared, split):
    folder = Folder(str(prepared), split)
    kept = [row for row in rows_of(prepared / "clips.jsonl") if row["verdict"] == "keep"]
    if split == "all":
        assert sorted(folder.captions()) == sorted(row["caption"] for row in kept)
    assert len(folder) == len(Records(str(prepared / "clips"), split))
    record = folder[0]
    facts = record.attributes
    (row,) = [row for row in kept if row["source"] == facts["source"].decode()]
    assert record.caption == row["caption"]
    assert record.duration == pytest.approx(row["end"] - row["start"], abs=1e-3)
    assert record.timestamps == pytest.approx(facts["timestamps"], abs=1e-4)
    example = to_example(
        record,
        clip=ClipSampling(num_frames=(4,), fps=(12.0,)),
        num_frames=4,
        height=32,
        width=32,
        tokenize=lambda caption: (np.zeros(4, int), np.ones(4, bool)),
        rng=np.random.default_rng(0),
    )
    assert example["video"].shape == (4, 32, 32, 3)


def test_no_source_is_in_both_splits(prepared):
    sources = [
        {record.attributes["source"] for record in map(source.__getitem__, range(len(source)))}
        for source in (Folder(str(prepared), "train"), Folder(str(prepared), "validation"))
    ]
    assert sources[0] and sources[1] and not sources[0] & sources[1]


def test_shards_are_split_by_count(prepared):
    shards = sorted(path.name for path in (prepared / "clips").glob("vdx-train*"))
    clips = len(Folder(str(prepared), "train"))
    assert len(shards) == -(-clips // 2)


def test_only_new_files_are_decoded_again(footage, prepared, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    before = tree(out)
    source = tmp_path / "footage"
    shutil.copytree(footage, source)

    # The same footage elsewhere: nothing is decoded, no byte changes.
    with monkeypatch.context() as patch:
        patch.setattr(stages, "look", lambda *_: pytest.fail("decoded again"))
        patch.setattr(stages, "make_clips", lambda *_: pytest.fail("encoded again"))
        prepare(source, out, "shards.per_shard=2")
    assert tree(out) == before

    # Another threshold: nothing is decoded either.
    with monkeypatch.context() as patch:
        patch.setattr(stages, "look", lambda *_: pytest.fail("decoded again"))
        prepare(source, out, "shards.per_shard=2", "decide.thresholds.blank.contrast=0")

    # One more file: it alone is decoded.
    looked = []
    real = stages.look
    monkeypatch.setattr(
        stages, "look", lambda path, *rest: looked.append(path) or real(path, *rest)
    )
    write_footage(tmp_path / "more", SOURCES + 1, FRAMES)
    for suffix in (".mp4", ".txt"):
        shutil.copy(tmp_path / "more" / f"{SOURCES}{suffix}", source)
    prepare(source, out, "shards.per_shard=2")
    assert [path.name for path in looked] == [f"{SOURCES}.mp4"]

    # All at once gives the same.
    prepare(source, tmp_path / "fresh", "shards.per_shard=2")
    (tmp_path / "fresh" / "prepare.json").write_text("{}")
    assert tree(tmp_path / "fresh") == tree(out)


def test_nothing_kept_is_refused_with_the_reason(footage, tmp_path, capsys):
    with pytest.raises(ConfigError, match="No clip is kept"):
        prepare(footage, tmp_path / "out", "decide.thresholds.blank.contrast=500")
    assert "--config.decide.thresholds.blank.contrast=" in capsys.readouterr().out


def test_a_missing_extra_is_no_fault_of_the_files(footage, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)  # the import fails as if it were absent
    with pytest.raises(ConfigError, match=r"vdx\[prepare\]"):
        prepare(footage, tmp_path / "out")


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_what_cannot_be_opened_has_a_row(tmp_path):
    write_footage(tmp_path / "in", 1, FRAMES)
    os.mkfifo(tmp_path / "in" / "pipe.mp4")
    (tmp_path / "in" / "list.csv").write_text(
        "file_name,caption\n0.mp4,a\npipe.mp4,b\ngone.mp4,c\n"
    )
    prepare(tmp_path / "in" / "list.csv", tmp_path / "out")
    found = {row["source"]: row for row in rows_of(tmp_path / "out" / "sources.jsonl")}
    assert found["0.mp4"]["verdict"] == "ok"
    assert "pipe" in found["pipe.mp4"]["error"]
    assert found["gone.mp4"]["reasons"] == ["unreadable"]


@pytest.mark.parametrize(
    "change", ["look.cell=1", "decide.thresholds.blurry.x=1", "clips.crf=-1", "shards.per_shard=0"]
)
def test_settings_that_do_not_exist_are_refused(tmp_path, change):
    with pytest.raises(ConfigError, match=change.rpartition(".")[0].partition(".x")[0]):
        prepare(tmp_path, tmp_path / "out", change)
