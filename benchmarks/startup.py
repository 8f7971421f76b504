"""Seconds from the launch of a training to the end of its first step, cold and with the cache.

    python benchmarks/startup.py --out=benchmarks/startup.json

vdx.main with configs/t2v_tiny.py, in turns with an empty folder for compiled programs and with one
that an earlier start has filled; medians. It ends when the numbers of step 1 are in the log, which
is when step 2 has been dispatched.
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
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS
ROOT = Path(__file__).parents[1]


def seconds(folder: Path, cache: Path, options: list[str]) -> float:
    """Of one start, which is killed once it has made its first step."""
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
    begin = time.perf_counter()
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)},
    )
    try:
        while not (log := workdir / "metrics.jsonl").exists() or not log.stat().st_size:
            if child.poll() is not None:
                raise RuntimeError(child.stderr.read()[-2000:])
            time.sleep(0.01)
        return time.perf_counter() - begin
    finally:
        child.kill()
        child.communicate()


def main(argv):
    times: dict[str, list[float]] = {"cold": [], "with the cache": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds(folder, folder / "kept", argv[1:])  # fills it
        for i in range(FLAGS.runs):
            times["cold"].append(seconds(folder, folder / f"new_{i}", argv[1:]))
            times["with the cache"].append(seconds(folder, folder / "kept", argv[1:]))
    rows = [
        {
            "start": name,
            "seconds": round(statistics.median(found), 2),
            "all": [round(s, 2) for s in found],
        }
        for name, found in times.items()
    ]
    print("| start | seconds to the first step |\n|---|---|")
    for row in rows:
        print(f"| {row['start']} | {row['seconds']:.1f} |")
    Path(FLAGS.out).write_text(
        json.dumps(
            {
                "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
                "load": os.getloadavg(),
                "rows": rows,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "A .json file.", required=True)
    flags.DEFINE_integer("runs", 5, "Starts of each kind.", lower_bound=1)
    app.run(main, flags_parser=lambda argv: FLAGS(argv, known_only=True))
