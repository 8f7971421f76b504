"""Evaluate a run: the flags of vdx.evaluate.

    python -m vdx.evaluate --workdir=runs/tiny

Runs the rows of the config's `eval` section on a run's weights, prints their scores, and writes
`eval.json`, the clips of `eval/` and the report. `--rows=flicker,control` runs only these.
"""

from pathlib import Path

import jax
from absl import flags, logging

from vdx.evaluation.report import write_report
from vdx.evaluation.run import check_rows, evaluate_run, format_scores
from vdx.experiment import load
from vdx.output_paths import check_output_folder
from vdx.programs import run_program, start
from vdx.weights import open_params

FLAGS = flags.FLAGS


def main() -> None:
    """Evaluate the run that the flags name."""
    workdir = Path(FLAGS.workdir)
    experiment = load(workdir)
    check_output_folder(workdir, "workdir")
    check_rows(experiment, FLAGS.rows)
    start()
    mesh = experiment.mesh_spec.make()
    with jax.set_mesh(mesh):
        params, step, _ = open_params(experiment, workdir, mesh, step=FLAGS.step)
        result = evaluate_run(experiment, params, workdir, step, FLAGS.rows or None)
    print(format_scores(experiment, result))
    print(f"Open {write_report(workdir)}")


def define_flags() -> None:
    """Define the flags."""
    flags.DEFINE_string("workdir", None, "The workdir of a run of vdx.main.")
    flags.DEFINE_string("step", None, 'A step, or "best"; default: the newest that verifies.')
    flags.DEFINE_list("rows", [], "Rows of config.eval; default: all.")


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    run_program(main, define_flags, required=("workdir",))
