"""The table of evaluators; the `eval` section of a config chooses its rows.

    "eval": {"loss": {"every": 500}, "prompt_following": {"prompts": 128}, "flicker": None}

A row that the section does not name is off, and so is one that is None (null). The exception is
`loss`, which runs with its defaults unless it is None.
"""

from collections.abc import Mapping
from typing import Any

from vdx.config.build import ConfigError, fill, lookup
from vdx.evaluation.control import Control
from vdx.evaluation.evaluator import NEEDS, Evaluator
from vdx.evaluation.flicker import Flicker
from vdx.evaluation.identity_drift import IdentityDrift
from vdx.evaluation.loss_at_times import LossAtTimes
from vdx.evaluation.prompt_following import PromptFollowing
from vdx.experiment import Experiment

__all__ = ["EVALUATORS", "make_evaluators", "make_rows"]


def make_rows(spec: Mapping[str, Any]) -> dict[str, Evaluator]:
    """Make the rows that an `eval` section turns on, in the order of the table.

    Raises ConfigError for an unknown row or setting.
    """
    for name, settings in spec.items():
        lookup(name, EVALUATORS, "config.eval")
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(
                f"config.eval.{name} = {settings!r}: give the settings of the row, "
                f"such as {{}}, or null to turn it off."
            )
    chosen = {"loss": {}, **spec}
    return {
        name: fill(row, chosen[name], f"config.eval.{name}")
        for name, row in EVALUATORS.items()
        if chosen.get(name) is not None
    }


def make_evaluators(experiment: Experiment) -> dict[str, Evaluator]:
    """Make the evaluators of a run.

    Raises ConfigError for an unknown row or setting, for a row that needs more than the run has,
    and for `config.train.best_metric` without a row that runs at every save.
    """
    rows = make_rows(experiment.eval)
    for name, row in rows.items():
        _check_needs(name, row, experiment)
    _check_best_metric(rows, experiment)
    return rows


def _check_needs(name: str, row: Evaluator, experiment: Experiment) -> None:
    missing = [NEEDS[need] for need in row.needs if not NEEDS[need].is_met(experiment)]
    if not missing:
        return
    usable = [
        other
        for other, kind in EVALUATORS.items()
        if all(NEEDS[need].is_met(experiment) for need in kind.needs)
    ]
    raise ConfigError(
        f"config.eval.{name} needs {' and '.join(need.description for need in missing)}. "
        f"config.data.source.name is {experiment.data.source.get('name')!r}. "
        f"Set config.eval.{name} = null; the rows that work for this run: {', '.join(usable)}."
    )


def _check_best_metric(rows: Mapping[str, Evaluator], experiment: Experiment) -> None:
    training = experiment.training
    if not training.best_metric:
        return
    scored = any(row.every and training.save_every % row.every == 0 for row in rows.values())
    if training.save_every and scored:
        return
    every = {f"config.eval.{name}.every": row.every for name, row in rows.items()}
    raise ConfigError(
        f"config.train.best_metric = {training.best_metric!r} needs a score at every save: "
        f"config.train.save_every = {training.save_every} must be a multiple of one of "
        f"{every or 'the rows of config.eval'}."
    )


EVALUATORS: dict[str, type[Evaluator]] = {
    "loss": LossAtTimes,
    "prompt_following": PromptFollowing,
    "control": Control,
    "flicker": Flicker,
    "identity_drift": IdentityDrift,
}
