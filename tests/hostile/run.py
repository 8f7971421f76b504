"""Hostile files against every reader, each class in a process of its own.

    python -m tests.hostile.run [--cases=1000] [--only=pth] [--case=17]

prints a table. --case writes the file of one case to the current folder instead. A process ends at
MOST_SECONDS of a case, or where its address space grows by more than the class states. The case
that it was at is a crash, and another process takes the next one.
"""

import argparse
import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

MOST_SECONDS = 10  # of work
MOST_WAITING = 120  # seconds, which a loaded machine may need for as much
MOST_MESSAGE = 12_000  # characters; a wrong value of a config is quoted
SEED = 14


@dataclasses.dataclass
class Result:
    """What the files of one class did."""

    tried: int
    outcomes: Counter  # refused, read, crashed, foreign (another's error), wrong
    slowest: float  # seconds of work
    most_memory: int  # MiB that one case added to the process
    problems: list[str]


def new_case(row, files, number):
    """Return (hostile file, honest file) of a case."""
    honest = files[number % len(files)]
    return row.damage(np.random.default_rng([SEED, number]), honest), honest


def memory(field):
    """Return a field of this process's status, in MiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024


def try_case(row, files, folder, number):
    """Return (outcome, explanation) of one case."""
    content, honest = new_case(row, files, number)
    path = folder / row.name
    path.write_bytes(content)
    try:
        got = row.read(path)
    except AssertionError as error:
        return "wrong", repr(error)
    except Exception as error:
        return explain(error, path)
    try:
        row.check(got, content, honest)
    except Exception as error:
        return "wrong", repr(error)[:300]
    return "read", ""


def explain(error, path):
    """Return the outcome of an error: refused, if it is one of vdx that names the file."""
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = type(error).__module__.startswith("vdx.") or (
        isinstance(error, ValueError) and f"{os.sep}vdx{os.sep}" in origin
    )
    text = str(error)
    if not ours:
        return "foreign", f"{type(error).__name__} in {origin}: {text[:200]}"
    names = [path.stem, *(file.name for file in path.parent.iterdir())]
    names.append(getattr(error, "key", path.stem))  # of a record, which a list of files names
    if not any(name in text for name in names) or len(text) > MOST_MESSAGE:
        return "foreign", f"{type(error).__name__} does not name the file: {text[:200]}"
    return "refused", ""


def child(row, numbers, folder, log):
    """Try cases in this process, and write a line for each."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + row.address_space
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable()
    warnings.simplefilter("ignore")
    files = row.make()
    for name, content in row.others().items():
        (folder / name).write_bytes(content)

    with log.open("a", buffering=1) as out:
        for number in numbers:
            Path("/proc/self/clear_refs").write_text("5")  # begin to measure the peak
            before = memory("VmRSS")
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            signal.alarm(MOST_WAITING)
            start = time.process_time()
            outcome, why = try_case(row, files, folder, number)
            seconds = time.process_time() - start
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            out.write(json.dumps([number, outcome, why, seconds, memory("VmHWM") - before]) + "\n")


def run_class(row, cases):
    """Return the result of one class."""
    result = Result(cases, Counter(), 0.0, 0, [])
    number = 0
    with tempfile.TemporaryDirectory() as name:
        while number < cases:
            folder = Path(name, "files")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            log = Path(name, f"{number}.jsonl")
            log.touch()

            pid = os.fork()
            if not pid:
                code = 1
                try:
                    child(row, range(number, cases), folder, log)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            _, status, _ = os.wait4(pid, 0)

            for line in log.read_text().splitlines():
                number, outcome, why, seconds, mebibytes = json.loads(line)
                number += 1
                result.outcomes[outcome] += 1
                result.slowest = max(result.slowest, seconds)
                result.most_memory = max(result.most_memory, round(mebibytes))
                if why:
                    result.problems.append(f"case {number - 1}: {outcome}: {why}")
            if status:
                code = os.waitstatus_to_exitcode(status)
                result.outcomes["crashed"] += 1
                if code in (-signal.SIGALRM, -signal.SIGPROF):
                    result.slowest = MOST_SECONDS
                result.problems.append(f"case {number}: crashed with {code}")
                number += 1
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, help="of each class")
    parser.add_argument("--times", type=int, default=1, help="times as many cases of each class")
    parser.add_argument("--only", help="one class, or several with commas between them")
    parser.add_argument("--case", type=int, help="write the file of this case")
    parser.add_argument("--json", help="write the results to this file")
    args = parser.parse_args()

    from tests.hostile.classes import CLASSES

    # A child needs no thread of its parent.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    rows = {name: CLASSES[name] for name in args.only.split(",")} if args.only else CLASSES
    if args.case is not None:
        row = rows[args.only]
        content, _ = new_case(row, row.make(), args.case)
        Path(row.name).write_bytes(content)
        return

    results = {}
    print("class        tried refused    read crashed foreign   wrong slowest s most MiB")
    for name, row in rows.items():
        result = run_class(row, args.cases or args.times * row.cases)
        results[name] = vars(result)
        counts = [result.outcomes[k] for k in ("refused", "read", "crashed", "foreign", "wrong")]
        print(
            f"{name:12}{result.tried:6}" + "".join(f"{n:8}" for n in counts),
            f"{result.slowest:9.3f}{result.most_memory:9}",
            flush=True,
        )
        for problem in result.problems[:20]:
            print("   ", problem, file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
