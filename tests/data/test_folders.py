"""Listings: everything in a folder is used or counted, links, names, splits of every size."""

import json
import os
import random
import unicodedata

import pytest

from vdx.data.folders import list_videos, validation_names
from vdx.data.record import BadRecord
from vdx.data.sources import VideoFolder
from vdx.files import warn_once

SUFFIXES = (".mp4", ".MP4", ".Mov", ".webm", ".txt", ".TXT", ".wmv", ".json", "")
NAMES = ("a", "b", "ç", "c\u0327", "d e", ".f", "._a", "日本", "x.y")
FOLDERS = ("", "sub/", "sub/deep/", ".cache/", "__MACOSX/")


def put(root, *names, text="x"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names(listing):
    return [entry.name for entry in listing.entries]


def is_hidden(name):
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


@pytest.mark.parametrize("seed", range(30))
def test_every_file_is_used_or_counted(tmp_path, seed):
    rng = random.Random(seed)
    files = {
        rng.choice(FOLDERS) + rng.choice(NAMES) + rng.choice(SUFFIXES)
        for _ in range(rng.randrange(30))
    }
    put(tmp_path, "one.mp4", "one.txt", *files)
    listing = list_videos(tmp_path)

    # Each visible file is a video with a caption, the caption, or left out, and only one of them.
    used = names(listing) + [
        entry.caption.relative_to(tmp_path).as_posix() for entry in listing.entries
    ]
    hidden = listing.left_out["hidden files and folders"]
    others = [name for names in listing.left_out.values() for name in names if name not in hidden]
    assert len(others) == len(set(others)) and not set(used) & set(others)
    visible = {name for name in ("one.mp4", "one.txt", *files) if not is_hidden(name)}
    assert set(used) | set(others) == visible
    assert bool(hidden) == any(map(is_hidden, files))

    # A caption has the name of its video, whatever the form of the letters.
    for entry in listing.entries:
        stems = (entry.name.rpartition(".")[0], entry.caption.relative_to(tmp_path).as_posix()[:-4])
        assert len({unicodedata.normalize("NFC", stem) for stem in stems}) == 1


def test_left_out_files_are_counted_in_one_line(tmp_path, caplog):
    put(tmp_path, "a.mp4", "a.txt", "b.mp4", "c.txt", "d.wmv", "._a.mp4", "Thumbs.db")
    put(tmp_path, ".ipynb_checkpoints/a-checkpoint.mp4", ".DS_Store")
    warn_once.cache_clear()
    for _ in range(2):
        VideoFolder(str(tmp_path))
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}: 1 videos with captions. Not used: 1 videos without a caption (b.mp4); "
        "1 captions without a video (c.txt); 1 files of kinds that are not read (d.wmv); "
        "4 hidden files and folders (.DS_Store, ._a.mp4, .ipynb_checkpoints and 1 more)."
    ]


def test_a_folder_of_which_everything_is_used_is_silent(tmp_path, caplog):
    put(tmp_path, "a.mp4", "a.txt")
    VideoFolder(str(tmp_path))
    assert not caplog.records


def test_linked_folders_and_files_are_read(tmp_path):
    put(tmp_path, "elsewhere/b.mp4", "elsewhere/b.txt", "blobs/1", "blobs/2")
    root = tmp_path / "root"
    put(root, "a.mp4", "a.txt")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    for link, blob in (("c.mp4", "1"), ("c.txt", "2")):  # as in the cache of a download
        (root / link).symlink_to(tmp_path / "blobs" / blob)
    listing = list_videos(root)
    assert names(listing) == ["a.mp4", "c.mp4", "more/b.mp4"]
    assert not any(listing.left_out.values())


def test_what_links_reach_twice_is_read_once_under_its_own_name(tmp_path):
    put(tmp_path, "sub/a.mp4", "sub/a.txt", "z.mp4", "z.txt")
    (tmp_path / "also").symlink_to("sub")  # sorts before "sub"
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    (tmp_path / "up").symlink_to("..")
    (tmp_path / "b.mp4").symlink_to("z.mp4")
    os.link(tmp_path / "z.mp4", tmp_path / "y.mp4")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    listing = list_videos(tmp_path)
    assert names(listing) == ["sub/a.mp4", "z.mp4"]
    twice = listing.left_out["files and folders that links reach twice"]
    assert sorted(twice) == ["also", "b.mp4", "sub/loop", "up", "y.mp4"]
    unusable = listing.left_out["broken links, pipes, devices or folders that cannot be opened"]
    assert sorted(unusable) == ["gone.mp4", "pipe.mp4", "self"]


def test_of_two_names_with_captions_the_one_that_is_no_link_is_read(tmp_path):
    put(tmp_path, "z.mp4", "z.txt", "b.txt")
    (tmp_path / "b.mp4").symlink_to("z.mp4")  # sorts before "z.mp4"
    listing = list_videos(tmp_path)
    assert names(listing) == ["z.mp4"]
    assert listing.left_out["files and folders that links reach twice"] == ["b.mp4"]


def test_a_folder_that_cannot_be_opened_is_counted(tmp_path, monkeypatch):
    put(tmp_path, "a.mp4", "a.txt", "shut/b.mp4", "shut/b.txt")
    scandir = os.scandir

    def scan(path):
        if path == tmp_path / "shut":
            raise PermissionError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    listing = list_videos(tmp_path)
    assert names(listing) == ["a.mp4"]
    unusable = listing.left_out["broken links, pipes, devices or folders that cannot be opened"]
    assert unusable == ["shut"]


@pytest.mark.parametrize("stored, listed", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_match_in_every_unicode_form(tmp_path, stored, listed):
    names_of = {form: unicodedata.normalize(form, "Gänse für Zoë") for form in ("NFC", "NFD")}
    put(tmp_path, f"{names_of[stored]}.mp4", f"{names_of[listed]}.txt")
    (found,) = list_videos(tmp_path).entries
    assert found.name == f"{names_of[stored]}.mp4"

    rows = [{"file_name": f"{names_of[listed]}.mp4", "caption": "x"}]
    put(tmp_path, "metadata.jsonl", text="".join(map(json.dumps, rows)))
    listing = list_videos(tmp_path)
    assert names(listing) == [f"{names_of[stored]}.mp4"]
    assert not any(listing.left_out.values())


def test_a_file_name_that_is_not_utf8_is_a_name(tmp_path):
    put(tmp_path, "\udcff.mp4", "\udcff.txt")
    assert names(list_videos(tmp_path)) == ["\udcff.mp4"]
    assert len(validation_names(["\udcff.mp4", "\ud83d.mp4"], 0.1)) == 1


def test_rows_are_compared_with_the_folder(tmp_path):
    put(tmp_path, "a.mp4", "b.mp4", "depth.mp4", "sub/c.mp4")
    (tmp_path / "also").symlink_to("sub")
    rows = [
        {"file_name": "a.mp4", "caption": "a", "depth": "depth.mp4"},
        {"file_name": "also/c.mp4", "caption": "c"},
        {"file_name": "none.mp4", "caption": "x"},
        {"file_name": "b.mp4", "text": "another key"},
    ]
    put(tmp_path, "metadata.jsonl", text="\n".join(map(json.dumps, rows)))
    listing = list_videos(tmp_path)
    assert names(listing) == ["a.mp4", "also/c.mp4", "none.mp4"]
    assert {kind: found for kind, found in listing.left_out.items() if found} == {
        "rows without a caption": ["b.mp4"],
        "rows whose file is not there": ["none.mp4"],
        "files and folders that links reach twice": ["also"],
    }
    put(tmp_path, "new.mp4")
    assert list_videos(tmp_path).left_out["videos that no row names"] == ["new.mp4"]


@pytest.mark.parametrize("caption", [{"caption": "x"}, {}], ids=["captioned", "not captioned"])
@pytest.mark.parametrize(
    "name", ["a.mp4", "./a.mp4", "sub//a.mp4", "also/a.mp4", ".a.mp4", "é.mp4"]
)
@pytest.mark.parametrize("kind", ["pipe", "broken link", "missing", "file"])
def test_whatever_a_row_names_is_counted_once(tmp_path, kind, name, caption):
    (tmp_path / "sub").mkdir()
    (tmp_path / "also").symlink_to("sub")
    path = tmp_path / unicodedata.normalize("NFD", name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "file":
        path.write_text("x")
    row = {"file_name": unicodedata.normalize("NFC", name), **caption}
    put(tmp_path, "metadata.jsonl", text=json.dumps(row))

    listing = list_videos(tmp_path)
    counted = [
        one
        for kind, names in listing.left_out.items()
        for one in names
        if kind != "files and folders that links reach twice"
    ]
    used = kind == "file" and bool(caption)
    assert len(counted) == (0 if used else 1)
    assert len(names(listing)) == len(caption)
    if kind in ("pipe", "broken link") and not name.startswith("."):
        assert listing.left_out["broken links, pipes, devices or folders that cannot be opened"]


def test_a_name_that_no_file_can_have_is_refused_in_few_words(tmp_path):
    row = {"file_name": "a" * 100_000 + ".mp4", "caption": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1.*100004 characters") as caught:
        VideoFolder(str(tmp_path))
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    row = {"file_name": "a.mp4", "caption": "\ufeffa red circle"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (entry,) = list_videos(tmp_path).entries
    assert entry.caption == "a red circle"


def test_a_caption_that_is_no_text_is_one_bad_record(tmp_path):
    put(tmp_path, *(f"{name}.mp4" for name in "abc"))
    (tmp_path / "a.txt").write_bytes("é".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes(b"x" * (1 << 24))
    (tmp_path / "c.txt").write_bytes(" ein Ball\r\n".encode("utf-16"))
    folder = VideoFolder(str(tmp_path))
    assert list(folder.captions()) == ["ein Ball"]
    for index, reason in ((0, r"a\.txt, line 1: .*is not UTF-8"), (1, "is longer than .* bytes")):
        with pytest.raises(BadRecord, match=f"not a usable caption: .*{reason}"):
            folder[index]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_no_side_of_a_split_is_empty(fraction, seed):
    rng = random.Random(seed)
    all_names = [f"{rng.random():.6f}.mp4" for _ in range(40)]
    for count in range(2, 41):
        found = validation_names(all_names[:count], fraction)
        assert 0 < len(found) < count
        assert found == validation_names(reversed(all_names[:count]), fraction)


def test_large_splits_have_their_share_and_clips_stay_on_their_side():
    all_names = [f"clip_{i}.mp4" for i in range(5000)]
    whole = validation_names(all_names, 0.1)
    assert 400 < len(whole) < 600
    assert validation_names(all_names[:2000], 0.1) == whole & set(all_names[:2000])


def test_one_video_is_trained_on_and_its_validation_refused(tmp_path):
    put(tmp_path, "a.mp4", "a.txt")
    assert len(VideoFolder(str(tmp_path), "train")) == 1
    with pytest.raises(
        ValueError, match=r"none for validation.*--config.data.validation.split=all"
    ):
        VideoFolder(str(tmp_path), "validation")
    assert len(VideoFolder(str(tmp_path), "all")) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(tmp_path, fraction):
    put(tmp_path, "a.mp4", "a.txt")
    with pytest.raises(ValueError, match=r"validation_fraction = .* is not in \[0, 1\)"):
        VideoFolder(str(tmp_path), validation_fraction=fraction)


def test_no_path_is_not_the_current_folder():
    with pytest.raises(ValueError, match=r"--config.data.path=FOLDER"):
        VideoFolder("")
