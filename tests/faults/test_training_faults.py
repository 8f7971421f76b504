"""Faults that the real command recovers from. Minutes long: `pytest -m faults`; CI runs it.

Figures of a longer run, with 40 kills: `python tests/kill_training.py`.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kill_training import ROOT, TINY, arrays, campaign, orphans, start, whole_steps
from vdx.files import read_json, read_rows
from vdx.train.checkpoint import Checkpoints
from vdx.train.preemption import PREEMPTED, STUCK

pytestmark = pytest.mark.faults
# Of a group, one test runs at a time, on one worker: tests that read the same finished run, and
# tests of two processes, which need both cores.
alone = pytest.mark.xdist_group("one")
eight = pytest.mark.xdist_group("eight")
pairs = pytest.mark.xdist_group("pair")
STEPS = 20
SHORT = [
    f"--config.train.steps={STEPS}",
    "--config.train.log_every=5",
    "--config.train.save_every=10",
    "--config.eval.loss.every=10",
    "--config.eval.loss.clips=8",
]
QUIET = "--config.eval.loss=null"  # for tests that read no loss of an evaluation
FIRST_STEP = re.compile(r"\d+/\d+ \[\d\d:\d\d<\d")
# Of several processes only the first would find a program in the cache, and would then wait for the
# others, which compile: JAX gives processes on CPUs 30 s to meet in a collective.
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
PLACES = {
    "one": {},
    "four": {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    "pair": {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", **NO_CACHE},
    "eight": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Holds the runs of this file that several tests read."""
    return tmp_path_factory.mktemp("faults")


def launch(workdir: Path, *args: str, place: str = "one") -> list[subprocess.Popen]:
    """The command, in one process, or in two that talk to each other ("pair")."""
    env, log = PLACES[place], workdir.parent / f"{workdir.name}.log"
    if place != "pair":
        return [start(workdir, log, *args, env=env)]
    # JAX gives two processes on CPUs 30 s to meet in their first collective; on a crowded machine
    # one compiles longer than that. launch/local.sh starts again on their exit code 75.
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [
            start(
                workdir,
                log.with_suffix(f".{i}.log"),
                *args,
                "--heartbeat=10",
                f"--coordinator=127.0.0.1:{port}",
                "--num_processes=2",
                f"--process_id={i}",
                env=env,
            )
            for i in range(2)
        ]
        while not FIRST_STEP.search(log_of(workdir)) and all(c.poll() is None for c in children):
            time.sleep(0.1)
        if "Gloo context initialization failed" not in log_of(workdir):
            break
        for i, child in enumerate(children):
            child.wait(60)
            log.with_suffix(f".{i}.log").unlink()
    return children


def log_of(workdir: Path) -> str:
    return "\n".join(
        p.read_text(errors="replace") for p in sorted(workdir.parent.glob(f"{workdir.name}.*log"))
    )


def ends(workdir: Path, children: list[subprocess.Popen], *codes: int, seconds: float = 240):
    """Waits for the processes; they end with one of `codes` and leave no children behind."""
    deadline = time.monotonic() + seconds
    try:
        found = [c.wait(max(1.0, deadline - time.monotonic())) for c in children]
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    assert all(code in codes for code in found), f"{found}: {log_of(workdir)[-4000:]}"
    deadline = time.monotonic() + 5  # multiprocessing's tracker tidies up and ends
    while left := [p for c in children for p in orphans(c.pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def until(condition, children, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(c.poll() is None for c in children), "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished(folder: Path, name: str, place: str, *args: str) -> Path:
    """A run from its beginning to its end, made once for all tests that compare with it."""
    workdir = folder / name
    if not (workdir / "report.html").exists():
        ends(workdir, launch(workdir, *SHORT, *args, place=place), 0)
    return workdir


def losses(workdir: Path) -> dict:
    """{(step, name): value} of all that was logged of losses; of a step logged twice the last."""
    return {
        (r["step"], k): v
        for r in read_rows(workdir / "metrics.jsonl")
        for k, v in r.items()
        if k.startswith(("train/", "validation/", "train_eval/"))
    }


def progress(workdir: Path, step: int = STEPS) -> dict:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.facts(step)["progress"]


# 20 steps are 20 steps


@pytest.mark.parametrize(
    ("place", "number", "resumed_with"),
    [
        pytest.param("one", signal.SIGTERM, ["--config.data.loader.workers=2"], marks=alone),
        ("four", signal.SIGINT, ["--config.data.loader.threads=0"]),
        pytest.param("pair", signal.SIGTERM, ["--config.data.loader.workers=1"], marks=pairs),
    ],
)
def test_preempted_and_resumed_is_the_same_run(folder, place, number, resumed_with):
    """Stopped by a signal at any step, saved, and resumed with other readers of data: every bit
    of the arrays, the place in the data and the logged losses are those of the whole run."""
    whole, parts = finished(folder, f"whole_{place}", place), folder / f"parts_{place}"
    slow = "--config.train.save_every=1"  # so that the test sees where the run is
    children = launch(parts, *SHORT, slow, place=place)
    until(lambda: max(whole_steps(parts), default=0) >= 6, children)
    begin = time.monotonic()
    children[-1].send_signal(number)  # to one process of several
    ends(parts, children, PREEMPTED, seconds=60)
    seconds, (stopped, *_) = time.monotonic() - begin, whole_steps(parts)[::-1]
    assert 6 <= stopped < STEPS and f"Stopped at step {stopped};" in log_of(parts)
    print(f"\n{place}: stopped at step {stopped} in {seconds:.1f} s")
    assert seconds < 30
    ends(parts, launch(parts, *SHORT, *resumed_with, place=place), 0)
    assert f"Resumes from step {stopped} of" in log_of(parts)
    assert arrays(parts, STEPS) == arrays(whole, STEPS)
    assert progress(parts) == progress(whole)
    assert losses(parts) == losses(whole) and len(losses(whole)) > 40


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("eight", "four", marks=eight),
        pytest.param("eight", "one", marks=eight),
        pytest.param("pair", "one", marks=pairs),
    ],
)
def test_another_mesh_goes_on_with_the_same_losses(folder, before, after):
    """From step 10 of another mesh: the same batches, and losses within 1e-6 at every step."""
    each = [
        "--config.train.log_every=1",
        QUIET,
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
        "--config.optim.name=adamw",
        "--config.optim.learning_rate=0.001",
    ]
    whole = finished(folder, f"mesh_{before}", before, *each)
    moved = folder / f"moved_{before}_{after}"
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "checkpoints" / str(STEPS))
    (moved / "metrics.jsonl").unlink()
    ends(moved, launch(moved, *SHORT, *each, place=after), 0)
    assert "Resumes from step 10" in log_of(moved)
    want, got = (
        {s: v for (s, k), v in losses(w).items() if k == "train/loss"} for w in (whole, moved)
    )
    assert sorted(got) == list(range(11, STEPS + 1))
    worst = max(abs(got[s] - want[s]) / want[s] for s in got)
    print(f"\n{before} -> {after}: losses within {worst:.1e}")
    assert worst < 1e-6
    assert progress(moved) == progress(whole)


def test_kills(tmp_path):
    tally = campaign(tmp_path, kills=10, inside_saves=6)
    print(
        f"\n{tally.kills} kills, {tally.inside_saves} inside a save, up to "
        f"{tally.most_kills_of_a_run} in a run: nothing lost"
    )
    assert tally.kills >= 10 and tally.inside_saves >= 6 and tally.most_kills_of_a_run >= 6


# Where a run begins


@alone
def test_what_wins_when_several_checkpoints_exist(folder, tmp_path):
    """The workdir's own, then config.resume, then config.init, then nothing."""
    first = finished(folder, "whole_one", "one")
    given = [QUIET, f"--config.resume={first}/checkpoints/10", f"--config.init={first}"]
    resumed = tmp_path / "resumed"
    ends(resumed, launch(resumed, *SHORT, *given), 0)
    assert f"Resumes from step 10 of {first}/checkpoints/10." in log_of(resumed)
    assert arrays(resumed, STEPS) == arrays(first, STEPS)
    ends(resumed, launch(resumed, *SHORT, *given), 0)
    assert f"Resumes from step {STEPS} of {resumed}." in log_of(resumed)

    tuned = tmp_path / "tuned"
    ends(tuned, launch(tuned, *SHORT, QUIET, given[2], "--config.train.steps=10"), 0)
    assert f"Starts with the averaged weights of {first}, step {STEPS}." in log_of(tuned)
    assert losses(tuned)[5, "train/loss"] < losses(first)[5, "train/loss"]

    ends(tmp_path / "lost", launch(tmp_path / "lost", *SHORT, "--config.resume=/no/where"), 1)
    assert "vdx: No checkpoint in /no/where/checkpoints." in log_of(tmp_path / "lost")
    assert "Traceback" not in log_of(tmp_path / "lost")


@alone
def test_another_model_is_refused_and_nothing_is_lost(folder, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished(folder, "whole_one", "one"), workdir)
    before = read_json(workdir / "config.json")
    wider = "--config.model.backbone.width=64"
    ends(workdir, launch(workdir, *SHORT, wider), 1)
    assert "model.backbone.width" in log_of(workdir)
    assert "--allow_config_change" in log_of(workdir)
    ends(workdir, launch(workdir, *SHORT, wider, "--allow_config_change"), 1)
    assert "belongs to another model or optimizer" in log_of(workdir)
    assert "Traceback" not in log_of(workdir)
    assert read_json(workdir / "config.json") == before and whole_steps(workdir) == [10, STEPS]


def test_the_best_step_is_kept_and_sampled(tmp_path):
    workdir = tmp_path / "run"
    best = [
        "--config.train.best_metric=validation/loss",
        "--config.train.max_to_keep=1",
        "--config.train.save_every=5",
        "--config.eval.loss.every=5",
        "--config.optim.learning_rate=0.05",
        "--config.optim.schedule=constant",
    ]
    ends(workdir, launch(workdir, *SHORT, *best, "--config.train.steps=10"), 0)
    ends(workdir, launch(workdir, *SHORT, *best), 0)
    scores = {s: v for (s, k), v in losses(workdir).items() if k == "validation/loss"}
    lowest = min(scores, key=scores.get)
    assert set(whole_steps(workdir)) == {lowest, STEPS}
    for flag in ("--averaged", "--noaveraged"):
        out = tmp_path / f"{flag}.mp4"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "vdx.sample",
                f"--workdir={workdir}",
                "--step=best",
                flag,
                "--prompt=a red circle",
                f"--out={out}",
                "--steps=2",
            ],
            cwd=ROOT,
            check=True,
        )
        made = read_json(out.with_suffix(".json"))["weights"]
        assert made["step"] == lowest and made["item"] == (
            "ema" if flag == "--averaged" else "params"
        )


# Disks and rivals


def test_a_second_process_is_refused(tmp_path):
    workdir = tmp_path / "run"
    first = launch(workdir, "--config.train.steps=100000")
    until(lambda: whole_steps(workdir), first)
    second = start(workdir, tmp_path / "second.log", *SHORT)
    assert second.wait(120) == 1
    text = (tmp_path / "second.log").read_text()
    assert f"is in use by process {first[0].pid} on" in text and "Traceback" not in text
    first[0].send_signal(signal.SIGTERM)
    ends(workdir, first, PREEMPTED)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@alone
def test_a_full_and_a_read_only_disk(folder, disk):
    workdir, log = disk / "run", disk.with_suffix(".log")

    def trains(*args: str) -> subprocess.Popen:
        log.write_text("")
        return start(workdir, log, *SHORT, QUIET, *args)

    child = trains("--config.train.save_every=5")
    until(lambda: whole_steps(workdir), [child])
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    assert child.wait(120) == 1
    (disk / "filler").unlink()
    assert re.search(r"vdx: .*No space left on device", log.read_text(), re.S)
    whole = whole_steps(workdir)

    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert trains().wait(120) == 1
    assert "Read-only file system" in log.read_text() and "Traceback" not in log.read_text()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)

    assert trains().wait(240) == 0
    assert f"Resumes from step {whole[-1]} of" in log.read_text()
    assert arrays(workdir, STEPS) == arrays(finished(folder, "whole_one", "one"), STEPS)


# Stuck


def test_a_worker_that_hangs_ends_the_program(tmp_path):
    """Its process is stopped, as a read that never returns would."""
    workdir = tmp_path / "run"
    children = launch(
        workdir,
        "--config.train.steps=100000",
        "--config.data.loader.workers=1",
        "--config.train.watchdog_seconds=60",  # a busy machine traces the step for half of it
    )
    until(lambda: whole_steps(workdir), children)
    for pid in orphans(children[0].pid):  # all of the group that live
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    ends(workdir, children, STUCK, seconds=180)
    text = log_of(workdir)
    assert "No step for 60 s" in text and "most recent call first" in text


@pairs
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_peer_ends_the_other(tmp_path, victim):
    workdir = tmp_path / "run"
    children = launch(workdir, "--config.train.steps=100000", place="pair")
    until(lambda: whole_steps(workdir), children)
    os.killpg(children[victim].pid, signal.SIGKILL)
    children[victim].wait()
    begin = time.monotonic()
    code = children[1 - victim].wait(60)
    seconds = time.monotonic() - begin
    text = (tmp_path / f"run.{1 - victim}.log").read_text(errors="replace")
    print(f"\nthe peer of process {victim} ended with {code} after {seconds:.1f} s")
    assert code in (STUCK, -signal.SIGABRT) and seconds < 10 + 15
    assert "lost touch with another one" in text or "another task died" in text, text[-3000:]


# Several processes as a user starts them


@pairs
def test_the_local_launcher(tmp_path):
    """Two processes share the batches; one writes; a signal to the launcher stops both, saved."""
    workdir = tmp_path / "run"
    command = ["launch/local.sh", "--processes=2", "configs/t2v_tiny.py", str(workdir)]
    quick = [a for a in (*TINY, *SHORT) if not a.startswith("--config=")]
    env = {**os.environ, **NO_CACHE, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    run = lambda *more: subprocess.Popen(
        [*command, *quick, *more],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    child = run("--config.train.save_every=1")
    until(lambda: whole_steps(workdir), [child])
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=90)
    assert child.returncode == PREEMPTED, out[-3000:]
    child = run("--config.train.sample_every=20", "--config.sample.steps=2")
    out, _ = child.communicate(timeout=240)
    assert child.returncode == 0, out[-3000:]
    assert out.count("Resumes from step") == 1  # only the first process logs
    assert whole_steps(workdir)[-1] == STEPS
    assert len(list((workdir / "samples" / f"{STEPS:08d}").glob("*.mp4"))) == 8
    rows = [r["step"] for r in read_rows(workdir / "metrics.jsonl") if "train/loss" in r]
    assert rows == sorted(set(rows)) and rows[-1] == STEPS


@pairs
def test_an_error_in_one_process_is_not_tried_again(tmp_path):
    done = subprocess.run(
        [
            "launch/local.sh",
            "--processes=2",
            "configs/t2v_tiny.py",
            str(tmp_path / "run"),
            "--config.data.loader.global_batch=7",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "starting again" not in done.stderr and "global_batch = 7" in done.stderr
