"""Measure the seconds from the launch of a training to the end of its first step.

    python benchmarks/startup.py --out=benchmarks/startup.json

This starts vdx.main with configs/t2v_tiny.py, in turns with an empty folder for compiled programs
and with one that an earlier start has filled, and takes medians. The clock stops when the metrics
of step 1 are in the log, which is when step 2 has been dispatched.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.01  # short against a start, which takes seconds


def seconds_to_first_step(folder: Path, cache: Path, options: Sequence[str]) -> float:
    """Return the seconds of one start, which is killed after its first step."""
    workdir = folder / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "vdx.main",
        "--config=configs/t2v_tiny.py",
        f"--workdir={workdir}",
        "--config.train.log_every=1",
        *options,
    ]
    start = time.perf_counter()
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
    )

    # The log gets its first line after the first step.
    log = workdir / "metrics.jsonl"
    try:
        while not log.exists() or not log.stat().st_size:
            if child.poll() is not None:
                raise RuntimeError(child.stderr.read()[-2000:])
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - start
    finally:
        child.kill()
        child.communicate()


def main(argv: Sequence[str]) -> None:
    options = argv[1:]
    times: dict[str, list[float]] = {"cold": [], "with the cache": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        # Fill the folder that later starts use.
        filled = folder / "filled"
        seconds_to_first_step(folder, filled, options)

        for i in range(FLAGS.runs):
            empty = folder / f"empty_{i}"
            times["cold"].append(seconds_to_first_step(folder, empty, options))
            times["with the cache"].append(seconds_to_first_step(folder, filled, options))

    rows = []
    print("| start | seconds to the first step |\n|---|---|")
    for start, found in times.items():
        median = round(statistics.median(found), 2)
        rows.append({"start": start, "seconds": median, "all": [round(s, 2) for s in found]})
        print(f"| {start} | {median:.1f} |")
    result = {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "rows": rows,
    }
    Path(FLAGS.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The .json file to write.", required=True)
    flags.DEFINE_integer("runs", 5, "Starts of each kind.", lower_bound=1)
    app.run(main, flags_parser=lambda argv: FLAGS(argv, known_only=True))
