"""Train: python -m vdx.main --config=configs/t2v_tiny.py --workdir=runs/tiny

The same command resumes an interrupted run. At the end the workdir holds checkpoints, samples,
`eval.json` where the data's truth is known, and `report.html`, the page to open.
"""

# ruff: noqa: E402
import os
import sys


def use_huge_pages() -> None:
    """Starts this command again with glibc's memory in huge pages that it keeps, which only its
    start can ask for: on a CPU a quarter of a training step goes into page faults."""
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = (
            "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
            "glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=500000000")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    use_huge_pages()      # before the imports, which take seconds

import datetime
import platform
import subprocess
from pathlib import Path

import jax
from absl import app, flags, logging

import vdx
from vdx.config import is_override, resolve
from vdx.evaluate import judge
from vdx.experiment import Experiment, Spec, measured
from vdx.files import write_json
from vdx.generate.wall import draw_wall
from vdx.metrics.report import write_report
from vdx.train.loop import train

FLAGS = flags.FLAGS


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    if FLAGS.distributed:
        jax.distributed.initialize()
    run(resolve(FLAGS.config, sys.argv[1:]), Path(FLAGS.workdir))


def run(config: Spec, workdir: Path) -> None:
    """Everything that the command does, from a resolved config."""
    config = measured(config)
    experiment = Experiment(config)
    mesh = experiment.mesh_spec.make()
    primary = jax.process_index() == 0
    if primary:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "config.json", config)

    with jax.set_mesh(mesh):
        generator = experiment.generator()

        def on_sample(step, ema):
            frames, fps = experiment.clip_default()
            draw_wall(generator, ema, experiment.wall, workdir / "samples" / f"{step:08d}",
                      num_frames=frames, fps=fps)
            if primary:
                write_report(workdir)

        if primary:
            write_json(workdir / "run.json", run_facts(experiment, mesh))
        done = train(experiment, workdir, mesh, on_sample)
        if experiment.judging.prompts:
            judge(experiment, done.state.ema, workdir, step=int(done.state.step))
    if primary:
        page = write_report(workdir)
        print(f"Trained {int(done.state.step)} steps in {done.seconds:.0f} s. Open {page}")


def run_facts(experiment: Experiment, mesh) -> dict:
    """What the report says about where a run came from."""
    import flax
    import grain
    import numpy
    import optax
    import orbax.checkpoint
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                            capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "command": " ".join(["python -m vdx.main", *sys.argv[1:]]),
        "commit": commit,
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{mesh.size} x {jax.devices()[0].device_kind}",
        "mesh": {k: v for k, v in mesh.shape.items()},
        "versions": {"vdx": vdx.__version__, "python": platform.python_version()} | {
            m.__name__: getattr(m, "__version__", "?")
            for m in (jax, flax, optax, grain, orbax.checkpoint, numpy)},
    }


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "The experiment, e.g. configs/t2v_tiny.py. Any value in "
                        "it can be set: --config.train.steps=100", required=True)
    flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the report go.",
                        required=True)
    flags.DEFINE_bool("distributed", False, "This is one of several processes (hosts) of a run; "
                      "its place among them is found by jax.distributed.initialize().")
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=lambda argv: FLAGS([a for a in argv if not is_override(a)]))
