"""Times of several ways to do the same, in turns, and the memory that each needs beside what it
was given."""

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

STATUS = Path("/proc/self/status")


def compare(ways: Mapping[str, Callable[[], Any]], runs: int = 5) -> dict[str, dict[str, float]]:
    """{name: {"seconds", "mib"}}: the median of `runs` calls, the ways in turns, so that what
    else the machine does falls on all alike; the growth of the process's memory in one call
    before. A call ends when its result is there."""
    peaks = {name: peak(way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: {"seconds": statistics.median(times[name]), "mib": peaks[name]} for name in ways}


def peak(way: Callable[[], Any]) -> float:
    """MiB by which a third call raises this process's resident memory (Linux). In the second one
    what the first has made, such as an optimizer's state, may still be laid out anew."""
    way()
    way()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    way()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    return next(
        int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)
    )


def where(**versions: str) -> dict[str, Any]:
    """What a result was measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **versions,
    }


def table(rows: list[dict], columns: Mapping[str, str]) -> str:
    """Markdown; columns: {key of a row: format of its values}."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [
        f"| {' | '.join(format(row[key], form) for key, form in columns.items())} |" for row in rows
    ]
    return "\n".join(lines)


def report(out: Path, result: dict, columns: Mapping[str, str]) -> None:
    """Writes the JSON and prints its `rows` as a table."""
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"], columns))
