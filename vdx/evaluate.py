"""Evaluate a run: the flags of vdx.evaluate.

    python -m vdx.evaluate --workdir=runs/tiny

Runs the rows of the config's `eval` section on a run's weights, prints their scores, and writes
`eval.json`, the clips of `eval/` and the report. `--rows=flicker,control` runs only these.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from vdx.compilation_cache import enable_compilation_cache
from vdx.evaluation.report import write_report
from vdx.evaluation.run import evaluate_run, format_scores
from vdx.experiment import load
from vdx.weights import open_params

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    """Evaluate the run that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    enable_compilation_cache()
    workdir = Path(FLAGS.workdir)
    experiment = load(workdir)
    mesh = experiment.mesh_spec.make()
    with jax.set_mesh(mesh):
        params, step, _ = open_params(experiment, workdir, mesh, step=FLAGS.step)
        result = evaluate_run(experiment, params, workdir, step, FLAGS.rows or None)
    print(format_scores(experiment, result))
    print(f"Open {write_report(workdir)}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a run of vdx.main.", required=True)
    flags.DEFINE_string("step", None, 'A step, or "best"; default: the newest that verifies.')
    flags.DEFINE_list("rows", [], "Rows of config.eval; default: all.")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
