"""Checksums of a folder: written once, then compared, replaced only on request."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdx.data.checksums import add_checksums

ROOT = Path(__file__).parents[2]
ROWS = [
    {"file_name": "a.mp4", "caption": "W\u00fcrfel \u2028 \ud800", "fps": 12.5, "tags": ["x"]},
    {"caption": None, "file_name": "sub/b.mp4", "sha256": None},
]


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"a" * 100_000)
    (tmp_path / "sub/b.mp4").write_bytes(b"b")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return tmp_path


def rows(folder):
    text = (folder / "metadata.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def test_checksums_are_added_and_everything_else_is_kept(folder):
    found = add_checksums(folder)
    assert found == {"new": ["a.mp4", "sub/b.mp4"], "same": [], "changed": [], "missing": []}
    assert rows(folder) == [
        ROWS[0] | {"sha256": sha(b"a" * 100_000)},
        ROWS[1] | {"sha256": sha(b"b")},
    ]
    before = (folder / "metadata.jsonl").read_bytes()
    assert add_checksums(folder)["same"] == ["a.mp4", "sub/b.mp4"]
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["a.mp4", "metadata.jsonl", "sub"]


def test_a_changed_file_is_refused_until_it_is_accepted(folder):
    add_checksums(folder)
    before = (folder / "metadata.jsonl").read_bytes()
    (folder / "sub/b.mp4").write_bytes(b"c")
    with pytest.raises(ValueError, match=r"1 files \(sub/b\.mp4\) changed .* Nothing was written"):
        add_checksums(folder)
    assert (folder / "metadata.jsonl").read_bytes() == before
    assert add_checksums(folder, update=True)["changed"] == ["sub/b.mp4"]
    assert rows(folder)[1]["sha256"] == sha(b"c")


def test_a_missing_file_keeps_its_row(folder):
    add_checksums(folder)
    before = rows(folder)
    (folder / "a.mp4").unlink()
    assert add_checksums(folder)["missing"] == ["a.mp4"] and rows(folder) == before


def test_text_files_become_rows(folder):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="neither metadata"):
        add_checksums(folder)
    (folder / "a.txt").write_text("eine Kugel\n", encoding="utf-8")
    add_checksums(folder)
    assert rows(folder) == [
        {"file_name": "a.mp4", "caption": "eine Kugel", "sha256": sha(b"a" * 100_000)},
        {"file_name": "sub/b.mp4", "sha256": sha(b"b")},
    ]


def test_the_command(folder):
    def run(*options):
        return subprocess.run(
            [sys.executable, "-m", "vdx.data.checksums", *map(str, options)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    assert "new: 2; same: 0" in run(folder).stdout
    (folder / "a.mp4").write_bytes(b"x")
    (folder / "sub/b.mp4").unlink()
    refused = run(folder)
    assert refused.returncode == 1 and "a.mp4) changed" in refused.stderr
    accepted = run(folder, "--update").stdout
    assert "changed: 1; missing: 1" in accepted and "sub/b.mp4) cannot be read" in accepted
    assert run(folder / "nowhere").returncode == 1 and run().returncode == 2
