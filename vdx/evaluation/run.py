"""Evaluates a run: while it trains, when it ends, and again from its checkpoints."""

import functools
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vdx.config.build import lookup
from vdx.evaluation.evaluator import EvaluationContext, Evaluator, Scores
from vdx.evaluation.table import make_evaluators
from vdx.experiment import Experiment
from vdx.files import read_json, write_json
from vdx.generate.video_io import NotFinite
from vdx.train.loop import PeriodicTask
from vdx.types import Params

__all__ = ["check_rows", "evaluate_run", "format_scores", "periodic_tasks", "rows_at_end"]


def rows_at_end(experiment: Experiment) -> list[str]:
    """Return the rows that do not run while training.

    Raises ConfigError, see make_evaluators.
    """
    return [name for name, row in make_evaluators(experiment).items() if not row.every]


def periodic_tasks(experiment: Experiment, workdir: Path, mesh: Mesh) -> tuple[PeriodicTask, ...]:
    """Prepare the rows that run while training.

    Raises ConfigError, see make_evaluators.
    """
    context = EvaluationContext(experiment, workdir, mesh)
    tasks = []
    for name, row in make_evaluators(experiment).items():
        if row.every:
            run = functools.partial(_run_task, context, name, row, row.prepare(context))
            tasks.append(PeriodicTask(name, row.every, run))
    return tuple(tasks)


def check_rows(experiment: Experiment, names: Iterable[str]) -> None:
    """Raise ConfigError for a row that is not on, and see make_evaluators."""
    evaluators = make_evaluators(experiment)
    for name in names:
        lookup(name, evaluators, "The rows that config.eval turns on")


def evaluate_run(
    experiment: Experiment,
    params: Params,
    workdir: Path,
    step: int,
    rows: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Run the rows of `config.eval`, and write their scores to eval.json.

    eval.json is {row: {"step": step, **scores}}, with null for NaN.

    rows: the rows to run; those of earlier runs stay in eval.json. None: all, and none stays.
    Call under `jax.set_mesh`. Returns the rows that were run. Raises ConfigError for a row that
    is not on, and see make_evaluators; NotFinite, after all other rows, for rows whose clips are
    not finite.
    """
    evaluators = make_evaluators(experiment)
    chosen = list(evaluators) if rows is None else list(rows)
    check_rows(experiment, chosen)

    # Scores are written after each row, so that an error in a later row loses none.
    context = EvaluationContext(experiment, workdir, jax.sharding.get_mesh())
    earlier = {} if rows is None else _read_scores(workdir)
    result: dict[str, Any] = {}
    refused = []
    for name in chosen:
        try:
            scores = evaluators[name].prepare(context)(params)
        except NotFinite as error:
            refused.append(f"{name}: {error}")
            continue
        result[name] = {"step": step, **scores}
        _write_scores(workdir, {**earlier, **result})
    if refused:
        raise NotFinite("No scores of these rows of config.eval. " + "\n".join(refused))
    return result


def format_scores(experiment: Experiment, result: dict[str, Any]) -> str:
    """Format the result of `evaluate_run` for a terminal."""
    evaluators = make_evaluators(experiment)
    pieces = []
    for name, scores in result.items():
        pieces.append(f"Step {scores['step']}. {evaluators[name].text(scores)}")
    return "\n\n".join(pieces)


def _run_task(
    context: EvaluationContext,
    name: str,
    row: Evaluator,
    run: Callable[[Params], Scores],
    step: int,
    params: Params,
) -> dict[str, float]:
    try:
        scores = run(params)
    except NotFinite as error:  # the training continues, with the checkpoint that is due
        logging.warning("No scores of %s at step %d: %s", name, step, error)
        return {}
    earlier = _read_scores(context.workdir)
    _write_scores(context.workdir, {**earlier, name: {"step": step, **scores}})
    return row.logged(scores)


def _read_scores(workdir: Path) -> dict[str, Any]:
    """Read eval.json; {} if there is none, or a killed run left half of it."""
    try:
        found = read_json(workdir / "eval.json")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write_scores(workdir: Path, result: Scores) -> None:
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", _without_nan(result))


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
