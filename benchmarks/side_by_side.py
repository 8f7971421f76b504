"""Time several ways to do the same work, and the memory that each adds."""

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc_pid_clear_refs(5)

Way = Callable[[], Any]


class Measured(NamedTuple):
    """The cost of one way."""

    seconds: float  # median of the runs
    mib: float  # growth of the process's memory in one call


def compare(ways: Mapping[str, Way], runs: int = 5) -> dict[str, Measured]:
    """Measure `runs` calls of every way.

    The ways take turns, so that other load on the machine affects all of them equally. A call has
    to return only when its result is computed.
    """
    peaks = {name: peak(way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: Measured(statistics.median(times[name]), peaks[name]) for name in ways}


def peak(way: Way) -> float:
    """Return the MiB by which a call raises this process's resident memory (Linux).

    The third call counts. The first one compiles. In the second one the layout of its results,
    such as an optimizer's state, may still change.
    """
    way()
    way()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)

    CLEAR_REFS.write_text(RESET_PEAK)
    before = _status("VmRSS")
    way()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Return a field of this process's status, in KiB."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise KeyError(f"{STATUS} has no field {name}.")


def where(**versions: str) -> dict[str, Any]:
    """Return the device, the cores and the versions that a result was measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **versions,
    }


def torch_threads() -> int:
    """Return the threads for torch: OMP_NUM_THREADS, or the cores that XLA may use."""
    return int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))


def table(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table. columns: {key of a row: format of its values}."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [format(row[key], spec) for key, spec in columns.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(out: Path, result: dict[str, Any], columns: Mapping[str, str]) -> None:
    """Write the result as JSON and print its `rows` as a table."""
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result["rows"], columns))
