"""Files that are whole or not there, JSON, and JSON lines."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A scratch path beside `path` that takes its name when the block ends well.

    It is on the disk by then, so that not even a loss of power leaves half a file.
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


def write_json(path: str | Path, value: Any) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The value; raises ValueError that names the file if it is not there or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a killed run may have left half a line."""
    rows = []
    for line in path.read_text("utf-8", "replace").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def host_file(path: str | Path, host: int) -> Path:
    """The file of one of several hosts, which may share a folder; host 0 writes `path` itself."""
    path = Path(path)
    return path.with_name(f"{path.stem}_{host}{path.suffix}") if host else path


def append_rows(path: Path, rows: Iterable[Any]) -> None:
    """Adds JSON lines, on lines of their own: a killed run may have left half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                out.write(b"\n")
        for row in rows:
            text = json.dumps(row, ensure_ascii=False)  # half a surrogate pair stays an escape
            out.write(text.encode(errors="backslashreplace") + b"\n")
