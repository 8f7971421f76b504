"""The parts of an evaluator: settings, needs, a run, and how its scores are shown."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from jax.sharding import Mesh

from vdx.config.build import check_fields
from vdx.config.ranges import Index
from vdx.data.scenes.source import Scenes
from vdx.data.sources import SOURCES
from vdx.evaluation.drawing import ClipDrawer
from vdx.evaluation.html import LoggedRows
from vdx.experiment import Experiment
from vdx.types import Params

__all__ = ["NEEDS", "EvaluationContext", "Evaluator", "Headline", "Need", "Scores"]

Scores = Mapping[str, Any]  # JSON values, as they stand in eval.json; NaN: inconclusive


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """The run that is evaluated; the evaluators of a run share it."""

    experiment: Experiment
    workdir: Path
    mesh: Mesh

    @functools.cached_property
    def drawing(self) -> ClipDrawer:
        """The generator of the run; shared, so that equal programs are compiled once."""
        return ClipDrawer(self.experiment, self.mesh)


@dataclasses.dataclass(frozen=True)
class Headline:
    """One of the big numbers at the top of the report."""

    name: str
    value: str  # "": not yet
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluator(abc.ABC):
    """One way to evaluate a run: a row of EVALUATORS, with its settings as fields.

    To add one, write a file with a subclass and a row in vdx/evaluation/table.py.
    """

    # Steps between runs while training. 0: only at the end of training, and by vdx.evaluate.
    every: Index = 0

    title: ClassVar[str]  # heading of its section in the report
    about: ClassVar[str]  # HTML below the heading: how to read the section
    needs: ClassVar[tuple[str, ...]] = ()  # rows of NEEDS

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range."""
        check_fields(self)

    @abc.abstractmethod
    def prepare(self, context: EvaluationContext) -> Callable[[Params], Scores]:
        """Return run(params) -> scores.

        Everything that does not depend on the weights is made here, once. `params` are those
        that the network runs with. Every process calls `run`, under the mesh; only the first one
        may write files.
        """

    @abc.abstractmethod
    def logged(self, scores: Scores) -> dict[str, float]:
        """Return the numbers that metrics.jsonl keeps, if this runs while training."""

    @abc.abstractmethod
    def text(self, scores: Scores) -> str:
        """Format the scores for a terminal."""

    @abc.abstractmethod
    def section(self, scores: Scores, workdir: Path, logged: LoggedRows) -> str:
        """Return the HTML of the scores, "" if there is nothing to show yet.

        Every text from `scores` and `logged` is escaped: the workdir may be a stranger's.
        """

    def headline(self, scores: Scores, logged: LoggedRows) -> Headline | None:
        """Return a number for the top of the report, or None if this has none."""
        return None


@dataclasses.dataclass(frozen=True)
class Need:
    """One requirement that an evaluator may have of a run."""

    description: str  # "needs ..."
    is_met: Callable[[Experiment], bool]


def _has_truth(experiment: Experiment) -> bool:
    # Compared before it is made: a stranger's config could point a source at any folder.
    return SOURCES.get(str(experiment.data.source.get("name"))) is Scenes


def _draws_pixels(experiment: Experiment) -> bool:
    if experiment.clip is None or experiment.model.channels != 3:
        return False
    try:
        experiment.model.tokenizer()
    except ConfigError:
        return False
    return True


NEEDS: dict[str, Need] = {
    "truth": Need("data whose truth is known (config.data.source.name = 'scenes')", _has_truth),
    "clips": Need(
        "clips drawn from captions as pixels (config.data.clip, a model of 3 channels and a "
        "signal that encodes captions)",
        _draws_pixels,
    ),
}
