"""Captions from files: text, JSON, CSV, parquet, and subtitles by time."""

import csv
import html
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdx.data.curation.caption import Caption
from vdx.extras import import_extra
from vdx.files import FileError, parse_json, read_json
from vdx.text_files import MAX_CAPTION_BYTES, read_lines, read_text

__all__ = ["CAPTION_FILES", "SUBTITLES", "TABLES", "read_caption", "read_table"]

# Columns, or keys of JSON, in the order in which they are looked for.
NAME_COLUMNS = ("file_name", "video", "video_path", "path", "file")
CAPTION_COLUMNS = ("caption", "text", "prompt")

SUBTITLES = (".srt", ".vtt")
CAPTION_FILES = (".txt", ".json", *SUBTITLES)  # of one video, with its name; earlier ones first
TABLES = (".csv", ".jsonl", ".parquet", ".json")  # of many videos, a row each

# A line of times of SubRip or WebVTT; hours are optional in the latter.
CUE = re.compile(r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)\s*-->\s*(?:(\d+):)?(\d+):(\d+)[.,](\d+)")
TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")


def read_caption(path: Path) -> Caption:
    """Return the caption in a file of one video. Raises FileError and OSError."""
    suffix = path.suffix.lower()
    if suffix in SUBTITLES:
        return Caption(cues=_parse_cues(read_text(path, MAX_CAPTION_BYTES)))
    if suffix == ".json":
        value = read_json(path)
        text = _first(value, CAPTION_COLUMNS) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise FileError(f'{path} holds no caption: expected {{"caption": "..."}} or a text.')
        return Caption(text.strip())
    return Caption(read_text(path, MAX_CAPTION_BYTES).strip())


def _parse_cues(text: str) -> tuple[tuple[float, float, str], ...]:
    """Return the cues of SubRip or WebVTT as (start, end, text), by start."""
    cues = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        for number, line in enumerate(lines):
            times = CUE.search(line)
            if times:
                spoken = " ".join(part.strip() for part in lines[number + 1 :])
                content = html.unescape(TAG.sub("", spoken)).strip()
                groups = times.groups(default="0")
                if content:
                    cues.append((_seconds(*groups[:4]), _seconds(*groups[4:]), content))
                break
    return tuple(sorted(cues))


def _seconds(hours: str, minutes: str, seconds: str, fraction: str) -> float:
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds) + float(f"0.{fraction}")


def read_table(path: Path) -> list[tuple[str, str | None]] | None:
    """Return (file name, caption) of the rows of a table; None if it is no such table.

    Raises FileError and OSError for a table that cannot be read.
    """
    rows = _READERS[path.suffix.lower()](path)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        return None
    if not any(_first(row, NAME_COLUMNS) for row in rows):
        return None

    found = []
    for number, row in enumerate(rows, start=1):
        name = _first(row, NAME_COLUMNS)
        caption = _first(row, CAPTION_COLUMNS)
        if not isinstance(name, str) or not name:
            raise FileError(f"{path}, row {number} names no file in {', '.join(NAME_COLUMNS)}.")
        if caption is not None and not isinstance(caption, str):
            raise FileError(f"{path}, row {number}: the caption is {caption!r}, expected text.")
        found.append((name, caption))
    return found


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the value of the first key that a row has."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _csv_rows(path: Path) -> list[Any]:
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise FileError(f"{path}, line {reader.line_num}: {error}.") from error


def _jsonl_rows(path: Path) -> list[Any]:
    return [
        parse_json(line, f"{path}, line {number}")
        for number, line in enumerate(read_lines(path), start=1)
        if line.strip()
    ]


def _json_rows(path: Path) -> list[Any]:
    """Return the objects of a JSON list, or of {file name: caption or object}."""
    value = read_json(path)
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return []
    rows = []
    for name, caption in value.items():
        if isinstance(caption, str):
            rows.append({"file_name": name, "caption": caption})
        elif isinstance(caption, dict):
            rows.append({"file_name": name, **caption})
    return rows if len(rows) == len(value) else []


def _parquet_rows(path: Path) -> list[Any]:
    parquet = import_extra("pyarrow.parquet", "prepare")
    try:
        names = parquet.read_schema(path).names
        columns = [name for name in names if name in NAME_COLUMNS + CAPTION_COLUMNS]
        rows: list[Any] = parquet.read_table(path, columns=columns).to_pylist()
    except Exception as error:  # pyarrow's errors have many classes
        raise FileError(f"{path} cannot be read as parquet: {error}.") from error
    return rows


_READERS = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}
