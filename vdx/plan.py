"""Plan a run for chips that are not here, before it is paid for.

    python -m vdx.plan --config=configs/t2v_base.py --topology=v5e:4x4 --clip=16,32,32 --text=256

Compiles the step that vdx.main would run and prints what it needs: operations, memory,
collectives, the least time, chip-hours. --what=sample plans the sampler, --what=decode the
decoder. --search tries meshes, remat policies and batches. See docs/planning.md.
"""

# ruff: noqa: E402
import os


def prepare_compiler() -> None:
    """Set the variables that libtpu reads as it starts.

    There is no TPU, and other processes may use the library at the same time.
    """
    os.environ.update(
        {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
    )
    # Errors are raised; the logs of the compiler are noise, unless they are wanted.
    for name in ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"):
        os.environ.setdefault(name, "3")


if __name__ == "__main__":
    prepare_compiler()  # before jax is imported

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from vdx.cli import exit_on_user_error, parse_mesh, refuse_arguments
from vdx.config.build import lookup
from vdx.config.loader import is_override, resolve
from vdx.config.ranges import Count, NonNegative, define_number
from vdx.experiment import Experiment
from vdx.files import write_json
from vdx.planning.job import Job, Slice, complete_shapes
from vdx.planning.planner import plan_job
from vdx.planning.programs import PROGRAMS
from vdx.planning.search import search
from vdx.planning.table import ranking, table

FLAGS = flags.FLAGS


def parse_sizes(text: str | None) -> tuple[int, ...] | None:
    """Parse the value of --clip. Raises UsageError for what is not integers."""
    if not text:
        return None
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise app.UsageError(f"--clip={text} is not like 16,32,32.") from error


def job_from_flags() -> Job:
    """Return the job that the command line describes."""
    lookup(FLAGS.what, PROGRAMS, "--what")
    config = resolve(FLAGS.config, sys.argv[1:])
    mesh = parse_mesh(FLAGS.mesh)
    if mesh:
        config["mesh"] = {"data": 1, **mesh}
    experiment = Experiment(config)
    clip, text = complete_shapes(experiment, parse_sizes(FLAGS.clip), FLAGS.text)
    return Job(experiment, FLAGS.what, clip, text)


def main(argv: Sequence[str]) -> None:
    """Plan, print, and write the plan if --out is given."""
    refuse_arguments(argv)
    with exit_on_user_error():
        job = job_from_flags()
        slice_ = Slice(FLAGS.topology)
        plans = search(job, slice_, FLAGS.most) if FLAGS.search else [plan_job(job, slice_)]

    for plan in plans[:1]:
        print(table(plan, job.experiment.training.steps, FLAGS.price))
    if FLAGS.search:
        print(ranking(plans))
    if FLAGS.out:
        rows = [plan.to_json() for plan in plans]
        write_json(Path(FLAGS.out), rows if FLAGS.search else rows[0])


if __name__ == "__main__":
    flags.DEFINE_string(
        "config",
        None,
        "The experiment, as for vdx.main, with any --config.KEY=VALUE.",
        required=True,
    )
    flags.DEFINE_string(
        "topology", None, "Chips: v5e:4x4, v5p:2x2x2, v6e:2x4, h100:8, ...", required=True
    )
    flags.DEFINE_string(
        "mesh", None, "Devices along the axes, such as fsdp=8,tensor=2; default: config.mesh."
    )
    flags.DEFINE_string("what", "train", f"One of {', '.join(PROGRAMS)}.")
    flags.DEFINE_string(
        "clip",
        None,
        "Frames, height and width of a clip as the model sees it, "
        "such as 16,32,32; default: those of the data.",
    )
    define_number("text", None, Count, "Tokens of a cached caption; default: those of the data.")
    flags.DEFINE_bool("search", False, "Try meshes, remat policies and batches.")
    define_number("most", 8, Count, "With --search: the number of variants that are planned.")
    define_number("price", None, NonNegative, "US dollars a chip-hour.")
    flags.DEFINE_string("out", None, "Write the plan to this .json file.")
    logging.set_verbosity(logging.ERROR)
    app.run(main, flags_parser=lambda argv: FLAGS([a for a in argv if not is_override(a)]))
