"""Records that were refused, each by name and reason, in one file a host.

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
    """Return the rows of all hosts by position, each (position, attempt) once.

    path: the file of host 0.
    """
    path = Path(path)
    files = [path, *sorted(path.parent.glob(f"{path.stem}_[0-9]*{path.suffix}"))]
    rows = [row for file in files for row in read_rows(file)]

    found: dict[tuple[float, int], dict[str, Any]] = {}
    for number, row in enumerate(rows):
        position = row.get("position")
        attempt = row.get("attempt")
        if isinstance(position, int) and isinstance(attempt, int):
            found[position, attempt] = row
        else:
            found[math.inf, number] = row  # a row of something else stays, at the end
    return [found[place] for place in sorted(found)]
