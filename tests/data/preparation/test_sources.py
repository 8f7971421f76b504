"""Lists of footage: every file has a row or is counted, captions of every kind of file."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vdx.data.curation.caption import Caption
from vdx.data.preparation.captions import read_caption
from vdx.data.preparation.sources import list_sources
from vdx.files import FileError

SRT = """1
00:00:01,000 --> 00:00:02,500
<i>A dog</i> runs.

2
00:01:00,000 --> 00:01:04,000
A &amp; B
"""
VTT = "WEBVTT\n\nNOTE a comment\n\n00:01.000 --> 00:02.500 align:start\nA dog\nruns.\n"


def put(root, **contents):
    root.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (root / name.replace("__", ".")).write_text(content, encoding="utf-8")


def captions(listing):
    return {file.name: file.caption.text for file in listing.files}


def test_every_file_is_footage_or_a_caption_or_counted(tmp_path):
    put(tmp_path, a__mp4="x", a__txt=" one \n", b__MOV="x", notes__pdf="x", orphan__txt="x")
    put(tmp_path / "sub", a__mp4="x", a__json='{"caption": "two"}', c__mkv="x", c__mkv__txt="three")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "broken.mp4").symlink_to("nowhere")
    found = list_sources(tmp_path)
    assert captions(found) == {
        "a.mp4": "one",
        "b.MOV": None,
        "notes.pdf": None,
        "sub/a.mp4": "two",
        "sub/c.mkv": "three",
    }
    line = str(found)
    for part in ("5 files, 3 of them", "orphan.txt", ".hidden", "broken.mp4"):
        assert part in line


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "parquet"])
@pytest.mark.parametrize("as_source", [True, False])
def test_tables(tmp_path, kind, as_source):
    put(tmp_path, **{"a__mp4": "x", "b c__mp4": "x"})
    rows = [
        {"file_name": "a.mp4", "caption": 'one, "quoted"\nline'},
        {"file_name": "b c.mp4", "caption": None},
    ]
    table = tmp_path / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "csv":
        table.write_text('file_name,caption\na.mp4,"one, ""quoted""\nline"\nb c.mp4\n')
    elif kind == "json":
        table.write_text(json.dumps(rows))
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list_sources(table if as_source else tmp_path)
    assert captions(found) == {"a.mp4": rows[0]["caption"], "b c.mp4": None}


def test_a_list_of_paths(tmp_path):
    put(tmp_path / "in", a__mp4="x", a__txt="one")
    put(tmp_path / "out", b__mp4="x")
    outside = tmp_path / "out" / "b.mp4"
    (tmp_path / "in" / "list.txt").write_text(f"a.mp4\n\n{outside}\n../out/b.mp4\nmissing.mp4\n")
    found = list_sources(tmp_path / "in" / "list.txt")
    assert captions(found) == {"a.mp4": "one", outside.as_posix(): None, "missing.mp4": None}


def test_a_table_does_not_replace_the_caption_of_a_file_itself(tmp_path):
    put(tmp_path, a__mp4="x", a__txt="own", captions__csv="video,text\na.mp4,other\ngone.mp4,x\n")
    found = list_sources(tmp_path)
    assert captions(found) == {"a.mp4": "own"}
    assert "captions.csv: a.mp4" in str(found) and "gone.mp4" in str(found)


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_a_caption_that_cannot_be_read_is_counted(tmp_path, name):
    put(tmp_path, a__mp4="x")
    (tmp_path / name).write_bytes(b"\xff\xff{")
    found = list_sources(tmp_path)
    assert captions(found) == {"a.mp4": None}
    assert name in str(found)


@pytest.mark.parametrize(("suffix", "text"), [("srt", SRT), ("vtt", VTT)])
def test_subtitles_are_captions_by_time(tmp_path, suffix, text):
    path = tmp_path / f"a.{suffix}"
    path.write_text(text)
    caption = read_caption(path)
    assert caption.cues[0] == (1.0, 2.5, "A dog runs.")
    assert caption.at(0, 1) is None
    assert caption.at(0, 1.01) == "A dog runs."
    assert caption.at(2.5, 3) is None
    if suffix == "srt":
        assert caption.at(2, 61) == "A dog runs. A & B"


def test_repeated_cues_are_one_text():
    caption = Caption(cues=((0, 1, "a"), (1, 2, "a"), (2, 3, "b")))
    assert caption.at(0, 3) == "a b"


@pytest.mark.parametrize("name", ["nowhere", "a.mp4", "empty.csv"])
def test_what_is_no_list_is_refused(tmp_path, name):
    put(tmp_path, a__mp4="x", empty__csv="")
    with pytest.raises(ValueError, match=name):
        list_sources(tmp_path / name)


@pytest.mark.parametrize("content", ['file_name\n"a', f"file_name\n{'x' * 140_000}"])
def test_a_csv_that_is_none_is_refused_by_its_line(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(FileError, match="line"):
        list_sources(tmp_path / "t.csv")


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_text("no parquet")
    with pytest.raises(FileError, match="parquet"):
        list_sources(tmp_path / "t.parquet")


def test_a_row_of_a_table_without_a_file_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("file_name,caption\na.mp4,x\n,y\n")
    with pytest.raises(FileError, match="row 2"):
        list_sources(tmp_path / "t.csv")
