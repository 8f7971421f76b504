"""Kills a real training run again and again, and shows that nothing was lost.

    python tests/kill_training.py --kills=40 --inside_saves=25

Every kill is SIGKILL to the whole process group, at a random instant or inside a save (proved by
the half-written step that is left). Every restart must resume from a step that verifies, never an
earlier one than before, and every run that reaches its end must have the very arrays of a run
that was never killed. Ends with exit code 1 and says where if one of these does not hold.
"""

import collections
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags, logging

from vdx.train.checkpoint import Checkpoints
from vdx.train.checksum import digest

ROOT = Path(__file__).parents[1]
STEPS = 60
MANY = 6  # kills of one run
TINY = [
    "--config=configs/t2v_tiny.py",
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=3",
    "--config.eval={'loss': None}",
    "--config.train.sample_every=0",
    "--config.data.loader.global_batch=8",
    "--config.data.clip.num_frames=(8,)",
    "--config.data.mean=-0.8",
    "--config.model.backbone.width=32",
    "--config.model.backbone.depth=2",
    "--config.model.backbone.heads=2",
    # The rate of a run within its warm-up, without its length: runs of any length share a program.
    "--config.optim.schedule=constant",
]


def start(workdir: Path, log: Path, *args: str, env: dict | None = None) -> subprocess.Popen:
    """The real training command at a very small size, in a process group of its own. `args`
    come after, and so before, those of TINY."""
    env = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        **os.environ,  # the tests have one cache for all their runs
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **(env or {}),
    }
    with log.open("a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "vdx.main", f"--workdir={workdir}", *TINY, *args],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def arrays(workdir: Path, step: int = STEPS) -> str:
    """One digest of parameters, optimizer, average and randomness of a step."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return digest(checkpoints.facts(step)["leaves"])


def whole_steps(workdir: Path) -> list[int]:
    """Steps whose save was finished."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def half_steps(workdir: Path) -> list[str]:
    """What a killed save leaves behind."""
    return sorted(p.name for p in (workdir / "checkpoints").glob("*") if not p.name.isdigit())


def orphans(group: int) -> list[int]:
    """Processes of a group that live on."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@dataclasses.dataclass
class Tally:
    kills: int = 0
    inside_saves: int = 0
    runs: int = 0
    most_kills_of_a_run: int = 0
    resumed_from: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def campaign(
    folder: Path, kills: int, inside_saves: int, seed: int = 0, say=lambda text: None
) -> Tally:
    """Kills until both counts are reached, and a run of MANY kills has come to its end; raises
    AssertionError if anything was lost."""
    rng, tally, log = random.Random(seed), Tally(), folder / "log.txt"
    whole = folder / "whole"
    assert start(whole, log).wait() == 0, f"the run without kills failed; see {log}"
    wanted = arrays(whole)
    workdir, killed, newest = folder / "run", 0, 0
    enough = False
    while not enough or killed or tally.most_kills_of_a_run < MANY:
        # Mostly inside saves, which come before a run's end, so that it can be killed often.
        inside, finish = rng.random() < 0.8, killed >= MANY and enough
        log.write_text("")
        left = set(half_steps(workdir))
        child = start(workdir, log)
        try:
            if not finish:
                pick_instant(child, workdir, rng, inside, left, log)
            if not finish and child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                tally.kills, killed = tally.kills + 1, killed + 1
                tally.inside_saves += bool(set(half_steps(workdir)) - left)
            assert child.wait() in (0, -signal.SIGKILL), log.read_text()[-3000:]
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        begun = re.search(r"Resumes from step (\d+)|(Starts with new)", log.read_text())
        if child.returncode == 0:
            assert begun, log.read_text()[-3000:]
        if begun:
            came_from = int(begun[1] or 0)
            assert came_from == newest, f"resumed from {came_from}, {newest} was whole"
            tally.resumed_from[came_from] += 1
        assert "damaged" not in log.read_text(), log.read_text()[-3000:]
        assert not orphans(child.pid), f"orphans: {orphans(child.pid)}"
        newest = max(whole_steps(workdir), default=0)
        enough = tally.kills >= kills and tally.inside_saves >= inside_saves
        say(f"{tally.kills} kills, {tally.inside_saves} inside a save; step {newest}")
        if child.returncode == 0:
            assert arrays(workdir) == wanted, "the arrays differ from those of the whole run"
            tally.runs += 1
            tally.most_kills_of_a_run = max(tally.most_kills_of_a_run, killed)
            shutil.rmtree(workdir)
            killed = newest = 0
    return tally


def pick_instant(child, workdir: Path, rng, inside: bool, left: set[str], log: Path) -> None:
    """Returns at a random instant of the child's life, or inside one of its saves."""
    if not inside:
        deadline = time.monotonic() + rng.uniform(0.5, 14)
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return
    skip, seen = rng.randrange(3), set(left)
    while child.poll() is None:
        new = set(half_steps(workdir)) - seen
        if new and skip == 0:
            time.sleep(rng.uniform(0, 0.03))
            return
        skip, seen = skip - len(new), seen | new
        time.sleep(0.001)


def main(_) -> None:
    options = flags.FLAGS
    folder = Path(options.folder or tempfile.mkdtemp(prefix="vdx-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    tally = campaign(folder, options.kills, options.inside_saves, options.seed, say=print)
    print(
        f"{tally.kills} kills, {tally.inside_saves} of them inside a save, in {tally.runs} runs "
        f"that all ended with the arrays of the run without kills (up to "
        f"{tally.most_kills_of_a_run} kills in one run); {time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 40, "At least so many.")
    flags.DEFINE_integer("inside_saves", 25, "Of which so many inside a save.")
    flags.DEFINE_integer("seed", 0, "Of the instants.")
    flags.DEFINE_string("folder", None, "Where the runs live; default: a new temporary folder.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
