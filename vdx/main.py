"""Train a model, evaluate it and write its report.

    python -m vdx.main --config=configs/t2v_tiny.py --workdir=runs/tiny

The same command resumes an interrupted run. At the end the workdir holds checkpoints, samples,
`eval.json` where the data's truth is known, and `report.html`, the page to open.
"""

# ruff: noqa: E402
import glob
import os
import sys


def use_huge_pages() -> None:
    """Restart this command with glibc's memory in huge pages that it keeps.

    Only the start of a process can set this. On a CPU a quarter of a training step is page faults.
    """
    accelerators = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*")
    if (
        "GLIBC_TUNABLES" not in os.environ
        and sys.platform == "linux"
        and not any(glob.glob(pattern) for pattern in accelerators)
    ):
        os.environ["GLIBC_TUNABLES"] = (
            "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
            "glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=500000000"
        )
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    use_huge_pages()  # before the imports, which take seconds

import contextlib
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh

import vdx
from vdx.config.loader import resolve
from vdx.distributed import define_process_flags, join_processes
from vdx.evaluation.report import write_report
from vdx.evaluation.run import evaluate_run, periodic_tasks, rows_at_end
from vdx.experiment import Experiment, Spec, with_pixel_mean
from vdx.generate.sample_grid import draw_sample_grid
from vdx.load_pipeline import sample_drawer
from vdx.output_paths import check_output_folder
from vdx.programs import run_program, start
from vdx.train.config_changes import check_config, list_changes
from vdx.train.loop import PeriodicTask, TrainedRun, train
from vdx.train.preemption import PreemptionHandler, exit_if_peer_lost, lock_workdir
from vdx.types import Params

FLAGS = flags.FLAGS
SAVED = (
    "Checkpoints saved before are whole: repair the cause, and the same command resumes the run."
)


def main() -> None:
    """Train as the flags say."""
    workdir = Path(FLAGS.workdir)
    check_output_folder(workdir, "workdir")
    config = resolve(FLAGS.config, sys.argv[1:])
    join_processes()
    start()
    with exit_if_peer_lost(), PreemptionHandler() as preemption:
        run(config, workdir, preemption, FLAGS.allow_config_change)


def run(
    config: Spec, workdir: Path, preemption: PreemptionHandler, allow_change: bool = False
) -> None:
    """Train a resolved config, evaluate the result and write the report.

    allow_change: a workdir may be continued with a config that learns something else.
    """
    primary = jax.process_index() == 0
    with lock_workdir(workdir) if primary else contextlib.nullcontext():
        experiment = with_pixel_mean(config, workdir)
        changes = check_config(workdir, experiment.config, allow_change)
        if changes and primary:
            print(f"{workdir} continues with another config:{list_changes(changes)}")
        mesh = experiment.mesh_spec.make()
        try:
            with jax.set_mesh(mesh):
                done = train_and_evaluate(experiment, workdir, mesh, preemption)
        except OSError as error:
            error.add_note(SAVED)
            raise
        if primary:
            page = write_report(workdir)
            print(f"Trained {int(done.state.step)} steps in {done.seconds:.0f} s. Open {page}")


def train_and_evaluate(
    experiment: Experiment, workdir: Path, mesh: Mesh, preemption: PreemptionHandler
) -> TrainedRun:
    """Train, with the evaluations and samples of the config, and evaluate the result."""
    done = train(
        experiment.job(),
        workdir,
        mesh,
        preemption,
        evaluations=periodic_tasks(experiment, workdir, mesh),
        samples=sample_tasks(experiment, workdir, mesh),
        facts=run_facts(experiment, mesh),
    )
    rows = rows_at_end(experiment)
    if rows:
        evaluate_run(experiment, done.params, workdir, int(done.state.step), rows)
    return done


def sample_tasks(experiment: Experiment, workdir: Path, mesh: Mesh) -> list[PeriodicTask]:
    """Return the task that draws the sample grid and writes the report, if any."""
    draw_samples = sample_drawer(experiment, mesh)
    if draw_samples is None:
        return []

    def draw(step: int, params: Params) -> dict[str, float]:
        folder = workdir / "samples" / f"{step:08d}"
        draw_sample_grid(lambda: draw_samples(params), folder)
        if jax.process_index() == 0:
            write_report(workdir)
        return {}

    return [PeriodicTask("samples", experiment.training.sample_every, draw)]


def run_facts(experiment: Experiment, mesh: Mesh) -> dict[str, Any]:
    """Return what the report says about the origin of a run."""
    import flax
    import grain
    import numpy
    import optax
    import orbax.checkpoint

    modules = (jax, flax, optax, grain, orbax.checkpoint, numpy)
    versions = {"vdx": vdx.__version__, "python": platform.python_version()}
    versions |= {module.__name__: getattr(module, "__version__", "?") for module in modules}
    return {
        "command": " ".join(["python -m vdx.main", *sys.argv[1:]]),
        "commit": commit_of_code(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "mesh": dict(mesh.shape),
        "versions": versions,
    }


def commit_of_code() -> str | None:
    """Return the commit of the code that runs; None without git or a repository."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string(
        "config",
        None,
        "The experiment, e.g. configs/t2v_tiny.py. Set any of its values: --config.train.steps=100",
    )
    flags.DEFINE_string("workdir", None, "The folder of checkpoints, logs and the report.")
    flags.DEFINE_bool(
        "allow_config_change",
        False,
        "Continue a workdir also with keys that change what is learned, such as a model's.",
    )
    define_process_flags()


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_program(main, define_flags, required=("config", "workdir"), takes_config=True)
