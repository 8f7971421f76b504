"""Train: python -m vdx.main --config=configs/t2v_tiny.py --workdir=runs/tiny

The same command resumes an interrupted run. At the end the workdir holds checkpoints, samples,
`eval.json` where the data's truth is known, and `report.html`, the page to open.
"""

# ruff: noqa: E402
import glob
import os
import sys


def use_huge_pages() -> None:
    """Starts this command again with glibc's memory in huge pages that it keeps, which only its
    start can ask for: on a CPU a quarter of a training step goes into page faults."""
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

import jax
from absl import app, flags, logging
from jax.sharding import Mesh

import vdx
from vdx.compilation_cache import enable_compilation_cache
from vdx.config.build import ConfigError
from vdx.config.loader import is_override, resolve
from vdx.data.pipeline import DataError
from vdx.data.workers import WorkerDied
from vdx.evaluation.report import write_report
from vdx.evaluation.run import evaluate_run, periodic_tasks, rows_at_end
from vdx.experiment import Experiment, Spec, with_pixel_mean
from vdx.files import write_json
from vdx.generate.sample_grid import draw_sample_grid
from vdx.interop.keymap import WeightsError
from vdx.train.checkpoint_match import CheckpointError
from vdx.train.loop import BadNumbers, PeriodicTask, TrainedRun, train
from vdx.train.preemption import (
    STUCK,
    PreemptionHandler,
    WorkdirInUse,
    exit_if_peer_lost,
    exit_now,
    lock_workdir,
)
from vdx.types import Params

FLAGS = flags.FLAGS


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    enable_compilation_cache()
    if FLAGS.coordinator:
        jax.distributed.initialize(
            FLAGS.coordinator,
            FLAGS.num_processes,
            FLAGS.process_id,
            heartbeat_timeout_seconds=FLAGS.heartbeat,
        )
    elif FLAGS.distributed:
        jax.distributed.initialize(heartbeat_timeout_seconds=FLAGS.heartbeat)
    with exit_on_user_error(), exit_if_peer_lost(), PreemptionHandler() as stop:
        run(resolve(FLAGS.config, sys.argv[1:]), Path(FLAGS.workdir), stop)


@contextlib.contextmanager
def exit_on_user_error():
    """Ends the program with a message instead of a stack trace where the message says it all."""
    try:
        yield
    except (
        ConfigError,
        DataError,
        WorkerDied,
        WeightsError,
        CheckpointError,
        BadNumbers,
        WorkdirInUse,
        OSError,
    ) as error:
        code = STUCK if isinstance(error, WorkerDied) else 1
        hint = (
            ["What was saved before is whole: once this is mended, the same command goes on."]
            if isinstance(error, OSError)
            else []
        )
        exit_now(code, "\n".join([str(error), *getattr(error, "__notes__", []), *hint]))


def run(config: Spec, workdir: Path, stop: PreemptionHandler) -> None:
    """Everything that the command does, from a resolved config."""
    primary = jax.process_index() == 0
    with lock_workdir(workdir) if primary else contextlib.nullcontext():
        experiment = with_pixel_mean(config, workdir)
        mesh = experiment.mesh_spec.make()
        with jax.set_mesh(mesh):
            done = train_and_evaluate(experiment, workdir, mesh, stop)
        if primary:
            page = write_report(workdir)
            print(f"Trained {int(done.state.step)} steps in {done.seconds:.0f} s. Open {page}")


def train_and_evaluate(
    experiment: Experiment, workdir: Path, mesh: Mesh, stop: PreemptionHandler
) -> TrainedRun:
    """Train, with the evaluations and samples of the config, and evaluate the result."""
    if jax.process_index() == 0:
        write_json(workdir / "run.json", run_facts(experiment, mesh))
    done = train(
        experiment.job(),
        workdir,
        mesh,
        stop,
        evaluations=periodic_tasks(experiment, workdir, mesh),
        samples=[sample_task(experiment, workdir)],
    )
    rows = rows_at_end(experiment)
    if rows:
        evaluate_run(experiment, done.params, workdir, int(done.state.step), rows)
    return done


def sample_task(experiment: Experiment, workdir: Path) -> PeriodicTask:
    """Return the task that draws the sample grid and writes the report."""
    generator = experiment.generator()

    def draw(step: int, params: Params) -> dict[str, float]:
        frames, fps = experiment.clip_default()
        folder = workdir / "samples" / f"{step:08d}"
        draw_sample_grid(
            generator, params, experiment.sample_prompts, folder, num_frames=frames, fps=fps
        )
        if jax.process_index() == 0:
            write_report(workdir)
        return {}

    return PeriodicTask("samples", experiment.training.sample_every, draw)


def run_facts(experiment: Experiment, mesh) -> dict:
    """What the report says about where a run came from."""
    import flax
    import grain
    import numpy
    import optax
    import orbax.checkpoint

    commit = None
    with contextlib.suppress(OSError):  # git may not be there
        commit = (
            subprocess.run(
                ["git", "rev-parse", "HEAD"],
                cwd=Path(__file__).parent,
                text=True,
                capture_output=True,
                check=False,
            ).stdout.strip()
            or None
        )
    return {
        "command": " ".join(["python -m vdx.main", *sys.argv[1:]]),
        "commit": commit,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "mesh": {k: v for k, v in mesh.shape.items()},
        "versions": {"vdx": vdx.__version__, "python": platform.python_version()}
        | {
            m.__name__: getattr(m, "__version__", "?")
            for m in (jax, flax, optax, grain, orbax.checkpoint, numpy)
        },
    }


if __name__ == "__main__":
    flags.DEFINE_string(
        "config",
        None,
        "The experiment, e.g. configs/t2v_tiny.py. Any value in "
        "it can be set: --config.train.steps=100",
        required=True,
    )
    flags.DEFINE_string(
        "workdir", None, "Where checkpoints, logs and the report go.", required=True
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "This is one of several processes (hosts) of a run; "
        "its place among them is found by jax.distributed.initialize().",
    )
    flags.DEFINE_string(
        "coordinator", None, "Where JAX cannot find them by itself: host:port of the first process,"
    )
    flags.DEFINE_integer("num_processes", None, "how many processes there are,")
    flags.DEFINE_integer("process_id", None, "and which of them this is.")
    flags.DEFINE_integer(
        "heartbeat",
        100,
        "Seconds after which a silent process counts as dead, and the others end.",
        lower_bound=1,
    )
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=lambda argv: FLAGS([a for a in argv if not is_override(a)]))
