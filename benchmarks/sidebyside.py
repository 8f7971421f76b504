"""What the benchmarks share: cases timed in turns, so that a slow minute of the machine hits all,
and the peak memory of a case in a process of its own."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PEAK = "VmHWM:"


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int = 7,
                warm: int = 2) -> dict[str, float]:
    """Median seconds of each; a case returns when its work is done."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm + rounds):
        for name, run in cases.items():
            begin = time.perf_counter()
            run()
            if turn >= warm:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory() -> float:
    """Most bytes that this process has had in memory (Linux)."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines()
             if line.startswith(PEAK))
    return 1024.0 * float(line.split()[1])


def alone(arguments: Sequence[str]) -> str:
    """The last line that this script prints in a process of its own with these arguments."""
    done = subprocess.run([sys.executable, sys.argv[0], *arguments], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n"
                           f"{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
