"""The records that were refused, each by name and reason, in a file a host.

Hosts may share a workdir, and two writers in one file lose lines: host 0 writes
`bad_records.jsonl`, host h `bad_records_h.jsonl`. A row is {"position", "attempt", "index", "key",
"reason", "host"}; a resumed run may write one again.
"""

import math
from pathlib import Path
from typing import Any

from vdx.files import read_rows

__all__ = ["read_bad_records"]


def read_bad_records(path: str | Path) -> list[dict[str, Any]]:
    """The rows of all hosts, each (position, attempt) once, by position. path: host 0's file."""
    path = Path(path)
    files = [path, *sorted(path.parent.glob(f"{path.stem}_[0-9]*{path.suffix}"))]
    found: dict[tuple[float, int], dict[str, Any]] = {}
    for number, row in enumerate(row for file in files for row in read_rows(file)):
        position, attempt = row.get("position"), row.get("attempt")
        if not isinstance(position, int) or not isinstance(attempt, int):
            position, attempt = math.inf, number
        found[position, attempt] = row
    return [found[place] for place in sorted(found)]
