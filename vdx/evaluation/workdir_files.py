"""Files of a workdir for the report; they may be missing, partial or hostile."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdx.evaluation.html import LoggedRows
from vdx.files import FileError, atomic_write, read_json, read_rows

__all__ = ["read_any", "read_metrics", "read_object", "write_bytes"]


def read_any(path: Path) -> Any:
    """Read JSON; None for a file that is missing or not wholly written."""
    try:
        return read_json(path)
    except FileError:
        return None


def read_object(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; {} for anything else."""
    found = read_any(path)
    return found if isinstance(found, dict) else {}


def read_metrics(path: Path) -> LoggedRows:
    """Read metrics.jsonl by step.

    A resumed run logs some steps again: the last of each value counts. Values and not rows,
    since training and evaluation log a row each for one step.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        if isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file completely or not at all, since a browser may reload any time."""
    with atomic_write(path) as part:
        part.write_bytes(content)
    return path
