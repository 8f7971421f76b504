"""A cache on disk: results under keys of everything that they depend on.

A key is a hash of the content, the stage with its version, the settings of that stage, and the
identity of the weights if there are any. A file appears under its key complete or not at all, so a
killed run is continued by running it again. Names and times of files are in no key.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdx.files import atomic_write, open_regular, read_bounded

__all__ = ["Store", "file_sha256", "key_of"]

MOST_BYTES = 1 << 32  # of one result


def key_of(**parts: Any) -> str:
    """Return the key of plain JSON values: 64 hex digits, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises FileError and OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Results of one stage, each in a file of its own."""

    def __init__(self, root: Path, stage: str, suffix: str) -> None:
        """Store the place. root: the folder of the cache. suffix: of the files."""
        self.folder = root / stage
        self.suffix = suffix

    def path(self, key: str) -> Path:
        """Return the file of a key; 256 folders keep each of them small."""
        return self.folder / key[:2] / f"{key}{self.suffix}"

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Return the result of a key; if it is not there, make it and write it."""
        path = self.path(key)
        if path.is_file():
            return read_bounded(path, MOST_BYTES)
        result = make()
        with atomic_write(path) as part:
            part.write_bytes(result)
        return result

    def has(self, key: str) -> bool:
        """Return whether there is a result."""
        return self.path(key).is_file()

    def remove_parts(self) -> None:
        """Remove the unfinished files that a killed run has left."""
        for part in self.folder.glob("*/.*"):
            part.unlink(missing_ok=True)
