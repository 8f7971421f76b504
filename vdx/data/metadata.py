"""The list of a folder's videos, `metadata.jsonl`: one JSON object a line."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vdx.files import parse_json
from vdx.text_files import read_lines

__all__ = ["read_metadata", "stays_inside"]

SHA256 = re.compile("[0-9a-f]{64}")
MOST_NAME = 4096  # characters of a path; no usual file system has longer ones
BYTE_ORDER_MARK = "\ufeff"  # some editors begin every text with it


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `metadata.jsonl`; raises ValueError if one is not valid."""
    return [
        _parse_row(line, f"{path}, line {number}")
        for number, line in enumerate(read_lines(path), start=1)
        if line.strip()
    ]


def _parse_row(line: str, where: str) -> dict[str, Any]:
    """Return a line of `metadata.jsonl` as a row; raises ValueError naming `where`."""
    row = parse_json(line, where)
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(
            f'{where} has no "file_name": {line[:80]!r}. A row reads '
            '{"file_name": "clip.mp4", "caption": "what it shows"}.'
        )

    if len(name) > MOST_NAME:
        raise ValueError(
            f'{where}: "file_name" has {len(name)} characters, at most {MOST_NAME} expected: '
            f"{name[:80]!r}..."
        )
    if not stays_inside(name):
        raise ValueError(
            f"{where}: {name!r} leaves the folder; name files inside it, with / between folders."
        )

    sha256 = row.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and SHA256.fullmatch(sha256)):
        raise ValueError(
            f'{where}: "sha256" is {sha256!r}, expected 64 of 0-9 a-f. Remove it, '
            "and let `python -m vdx.data.checksums` write it."
        )

    if isinstance(row.get("caption"), str):
        row["caption"] = row["caption"].removeprefix(BYTE_ORDER_MARK)
    return row


def stays_inside(name: str) -> bool:
    """Return true if a name stays inside its folder on every operating system.

    A plain name on one system may be a path or a drive on another.
    """
    path = PurePosixPath(name)
    return not (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or PureWindowsPath(name).drive
    )
