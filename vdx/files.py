"""Files: complete or absent, regular and of bounded size, JSON, JSON lines."""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

# What a path may lead to instead of a regular file.
OTHER_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class FileError(ValueError):
    """A file that cannot be used. The message names it."""


def check_regular_file(path: str | Path) -> int:
    """Return the size of a regular file in bytes. Links are followed.

    A pipe may never end, and a device may fill the memory. Raises FileError for whatever is no
    regular file, and OSError for a file that is missing or not accessible.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # a name with NUL
        raise FileError(f"{str(path)!r} cannot be the name of a file: {error}.") from error
    _check_kind(path, status)
    return status.st_size


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes. Never waits for a writer, as pipes do.

    Raises what `check_regular_file` raises.
    """
    check_regular_file(path)

    # The path may lead to another file by now.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_kind(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_kind(path: str | Path, status: os.stat_result) -> None:
    """Raise FileError for whatever is no regular file."""
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        found = OTHER_KINDS.get(kind, "no file")
        raise FileError(f"{path} is {found}; only regular files are read.")


def read_bounded(path: str | Path, most: int) -> bytes:
    """Return the bytes of a regular file.

    Raises FileError for more than `most` bytes, and what `check_regular_file` raises.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FileError(f"{path} is longer than {most:,} bytes, the most that is read of it.")
    return content


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
