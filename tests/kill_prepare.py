"""Kills a real `vdx.prepare` again and again, and shows that it gives the same bytes.

    python tests/kill_prepare.py --kills=40

Every kill is SIGKILL to the whole process group, at a random instant. A run that reaches its end
must have, file by file, the bytes of a run that was never killed, and then starts anew. Ends with
exit code 1 and says where if it does not.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from vdx.generate.video_io import write_video

ROOT = Path(__file__).parents[1]
SOURCES = 5


def write_footage(folder: Path, count: int = SOURCES, frames: int = 36) -> None:
    """Write moving textures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        levels = rng.integers(0, 255, (12, 40, 3)).astype(np.uint8)
        texture = levels.repeat(8, 0).repeat(8, 1)  # [96 320 3]
        moving = (np.roll(texture, -3 * step, axis=1)[:, :128] for step in range(frames))
        write_video(folder / f"{number}.mp4", moving, 12, min_side=16)
        (folder / f"{number}.txt").write_text(f"texture {number}")


def start(source: Path, out: Path, log: Path, *args: str) -> subprocess.Popen:
    """Start the real command in a process group of its own."""
    command = [sys.executable, "-m", "vdx.prepare", f"--source={source}", f"--out={out}"]
    with log.open("a") as stream:
        return subprocess.Popen(
            [*command, "--workers=2", *args],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def tree(folder: Path) -> dict[str, str]:
    """Return the checksums of all files of a folder but the lock, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def campaign(root: Path, kills: int, seed: int = 0) -> int:
    """Kill runs at random instants; return how many reached their end.

    Raises AssertionError if one of these has other bytes than the run that was not killed.
    """
    source = root / "footage"
    write_footage(source)
    log = root / "log"
    begun = time.monotonic()
    assert start(source, root / "whole", log).wait() == 0, log.read_text()
    seconds = time.monotonic() - begun
    expected = tree(root / "whole")
    assert any("array_record" in name for name in expected)

    rng = random.Random(seed)
    done = 0
    ended = 0
    while done < kills or not ended:
        process = start(source, root / "killed", log)
        try:
            last = done >= kills
            process.wait(None if last else rng.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            continue
        assert process.returncode == 0, log.read_text()
        found = tree(root / "killed")
        differing = {
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        }
        assert not differing, differing
        shutil.rmtree(root / "killed")
        ended += 1
    return ended


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as root:
        ended = campaign(Path(root), flags.FLAGS.kills, flags.FLAGS.seed)
    print(f"{flags.FLAGS.kills} kills, {ended} runs to their end, each with the same bytes.")


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 40, "The number of kills.")
    flags.DEFINE_integer("seed", 0, "Of the instants.")
    app.run(main)
