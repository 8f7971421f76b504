"""Files: complete or absent, regular and of bounded size, JSON, JSON lines."""

import contextlib
import functools
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np

# Bounds of JSON. The values of the largest file take less than 0.5 GB.
MOST_JSON_BYTES = 1 << 25
MOST_JSON_VALUES = 1_000_000  # shards of a model of 100,000 arrays name 300,000
MOST_JSON_LEVELS = 64  # a config has fewer than 10
MOST_DIGITS = 20  # of an integer of 64 bits and its sign
MOST_EXCERPT = 80  # characters of a stranger's text in a message
TOO_DEEP = f"its lists and objects are nested more than {MOST_JSON_LEVELS} deep"
# Versions of the .npy format. The third is for names of fields, which no array of numbers has.
NPY_HEADERS: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
MOST_NPY_HEADER = 4096  # characters; numpy writes 128
MOST_AXES = 32
MOST_BYTES = 1 << 48  # of an array
READ_BYTES = 1 << 20  # at once
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


def open_regular(path: str | Path) -> BufferedReader:
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


def file_stamp(path: str | Path) -> tuple[int, int] | None:
    """Return (bytes, time of the last change in ns) of a file, or None.

    None is for a file that cannot be accessed. A file that is replaced under its name has another
    stamp. Links are followed.
    """
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_size, facts.st_mtime_ns


def _check_kind(path: str | Path, status: os.stat_result) -> None:
    """Raise FileError for whatever is no regular file."""
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        found = OTHER_KINDS.get(kind, "no file")
        raise FileError(f"{path} is {found}; only regular files are read.")


def read_bounded(path: str | Path, most: int) -> bytes:
    """Return the bytes of a regular file, in memory in proportion to its size.

    Raises FileError for more than `most` bytes, and what `check_regular_file` raises.
    """
    content = bytearray()
    with open_regular(path) as file:
        # A read reserves as many bytes as it may return.
        while len(content) <= most and (chunk := file.read(READ_BYTES)):
            content += chunk
    if len(content) > most:
        raise FileError(f"{path} is longer than {most:,} bytes, the most that is read of it.")
    return bytes(content)


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


def read_json(path: str | Path, wide: bool = False) -> Any:
    """Read the value in a JSON file.

    wide: see `parse_json`. Raises FileError that names the file if it is missing, and as
    `parse_json` does.
    """
    try:
        content = read_bounded(path, MOST_JSON_BYTES)
    except OSError as error:
        raise FileError(f"{path} cannot be read as JSON: {error}.") from error
    return parse_json(content, path, wide=wide)


def read_json_object(path: str | Path, wide: bool = False) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises FileError, also for other values."""
    value = read_json(path, wide)
    if not isinstance(value, dict):
        raise FileError(f"{path} holds {_kind_of(value)}, expected a JSON object.")
    return value


def parse_json(
    content: bytes | str, where: str | Path, finite: bool = True, wide: bool = False
) -> Any:
    """Return the value of a JSON text, in memory in proportion to the bounds above.

    where: the file, for messages. finite: refuse NaN and Infinity. wide: return integers of more
    than 64 bits as floats. Raises FileError for what is no JSON in UTF-8, for a name that stands
    twice in one object, for an integer of more than 64 bits unless `wide`, and for more bytes,
    values or levels than the bounds.
    """
    try:
        # Editors on Windows begin a file with a byte order mark.
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        _check_json_size(text)
        value = json.loads(
            text,
            object_pairs_hook=_unique_names,
            parse_int=_wide_integer if wide else _integer,
            parse_float=_finite_float if finite else float,
            parse_constant=_refuse_constant if finite else float,
        )
        _check_depth(value)
    except UnicodeDecodeError as error:
        raise FileError(f"{where} is not UTF-8 text: byte {error.start:,} fits nothing.") from None
    except RecursionError:
        raise FileError(f"{where} cannot be read as JSON: {TOO_DEEP}.") from None
    except ValueError as error:
        raise FileError(f"{where} cannot be read as JSON: {error}.") from None
    return value


def _check_json_size(text: str) -> None:
    """Raise ValueError for a text that may hold more values than the bound.

    Every value but the first has a comma or a bracket before it. Those inside of texts count too.
    """
    if len(text) > MOST_JSON_BYTES:
        raise ValueError(f"it has more than {MOST_JSON_BYTES:,} characters")
    if sum(map(text.count, ",[{")) > MOST_JSON_VALUES:
        raise ValueError(f"it has more than {MOST_JSON_VALUES:,} values")


def _check_depth(value: Any) -> None:
    """Raise ValueError for lists and objects inside of one another beyond the bound."""
    level = [value]
    for _ in range(MOST_JSON_LEVELS):
        inside: list[Any] = []
        for entry in level:
            if isinstance(entry, list):
                inside.extend(entry)
            elif isinstance(entry, dict):
                inside.extend(entry.values())
        if not inside:
            return
        level = inside
    raise ValueError(TOO_DEEP)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError for a name that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {excerpt(name)} stands twice in one object")
            seen.add(name)
    return found


def _integer(digits: str) -> int:
    """Return an integer. Raises ValueError beyond 64 bits."""
    if len(digits) <= MOST_DIGITS and -(2**63) <= int(digits) < 2**64:
        return int(digits)
    raise ValueError(f"the integer {digits[:MOST_DIGITS]}... has more than 64 bits")


def _wide_integer(digits: str) -> int | float:
    """Return an integer, as a float beyond 64 bits.

    Raises ValueError beyond the largest float.
    """
    try:
        return _integer(digits)
    except ValueError:
        return _finite_float(digits)


def _finite_float(digits: str) -> float:
    """Return a number. Raises ValueError for one beyond the largest float."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {excerpt(digits)} is too large")
    return number


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN or Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no number")


def _kind_of(value: Any) -> str:
    """Return how JSON calls the type of a value."""
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def excerpt(text: str) -> str:
    """Return the beginning of a stranger's text in quotes, safe to print."""
    head = text[:MOST_EXCERPT]
    quoted = repr(head)  # escapes whatever is not printable
    return quoted if head == text else f"{quoted}..."


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file that has one a line.

    A missing file has none. Lines that are no JSON object are skipped: a killed run may have left
    half a line. So is the rest of a line beyond the bound.
    """
    if not path.is_file():
        return []

    rows = []
    with open_regular(path) as file:
        is_rest = False
        for piece in iter(lambda: file.readline(MOST_JSON_BYTES), b""):
            if not is_rest:
                with contextlib.suppress(FileError):
                    rows.append(parse_json(piece.decode("utf-8", "replace"), path, finite=False))
            is_rest = not piece.endswith(b"\n")
    return [row for row in rows if isinstance(row, dict)]


def read_npy(path: str | Path) -> np.ndarray:
    """Return the array of a .npy file, read-only and mapped into memory.

    Raises FileError for another format, for entries that are no plain numbers, and for a file whose
    size is not that of its array.
    """
    size = check_regular_file(path)
    try:
        with open_regular(path) as file:
            version = np.lib.format.read_magic(file)
            shape, fortran_order, dtype = NPY_HEADERS[version](file, MOST_NPY_HEADER)
            start = file.tell()
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header, which can fail in any way
        message = excerpt(str(error) or type(error).__name__)
        raise FileError(f"{path} is not a .npy file of one array: {message}.") from error

    if dtype.kind not in "biuf":  # an entry that is itself an array is of kind V
        raise FileError(f"{path} holds entries of type {excerpt(str(dtype))}, expected numbers.")
    try:
        needed = start + array_bytes(shape, dtype.itemsize)
    except ValueError as error:
        raise FileError(f"{path} is not a .npy file of one array: {error}.") from error
    if size != needed:
        raise FileError(
            f"{path} has {size:,} bytes, and its header requires {needed:,}: it is cut off, or "
            "holds more than one array."
        )

    order: Literal["C", "F"] = "F" if fortran_order else "C"
    if size == start:  # nothing to map
        return np.empty(shape, dtype, order)
    return np.memmap(path, dtype, "r", start, shape, order)


def array_bytes(shape: Sequence[Any], itemsize: int) -> int:
    """Return the bytes of an array. Raises ValueError for a shape that no array has."""
    sizes_valid = all(type(size) is int and 0 <= size <= MOST_BYTES for size in shape)
    # numpy refuses an array whose other sizes are too large, even if one is zero.
    if len(shape) > MOST_AXES or not sizes_valid:
        raise ValueError("its shape is no shape of an array")
    if math.prod(size for size in shape if size) * itemsize > MOST_BYTES:
        raise ValueError("its shape is too large")
    return math.prod(shape) * itemsize


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
