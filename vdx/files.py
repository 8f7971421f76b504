"""Files that are complete or absent, JSON, and JSON lines."""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` if the block raises nothing.

    The temporary file is in the folder of `path`. It is flushed to the disk before it takes the
    name, so that not even a loss of power leaves half a file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def printable(text: str) -> str:
    """Return text that every stream can encode, with half surrogates as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once in this process."""
    logging.warning("%s", printable(message))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read the value in a JSON file.

    Raises ValueError that names the file if it is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file that has one a line.

    A missing file has none. Lines that are no JSON object are skipped: a killed run may have left
    half a line.
    """
    if not path.is_file():
        return []

    rows = []
    for line in path.read_text("utf-8", "replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Append values as JSON, one a line.

    A killed run may have left half a line at the end of the file; the first value starts a new
    line then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                out.write(b"\n")

        for row in rows:
            text = json.dumps(row, ensure_ascii=False)
            # Half a surrogate pair, which UTF-8 cannot encode, becomes an escape.
            out.write(text.encode(errors="backslashreplace") + b"\n")


def host_file(path: str | Path, host: int) -> Path:
    """Return the file that one of several hosts writes; host 0 writes `path` itself.

    The hosts may share a folder, so the names of the others end in their numbers.
    """
    path = Path(path)
    return path.with_name(f"{path.stem}_{host}{path.suffix}") if host else path
