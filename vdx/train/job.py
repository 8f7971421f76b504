"""The job of the training loop: all that it needs from an experiment, typed.

`vdx.experiment.Experiment.job` builds it from a config; a test may build it by hand.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import optax
from jax.sharding import Mesh

from vdx.config.sections import TrainSection
from vdx.data.pipeline import Batches, Loader
from vdx.parallel import PARAM_RULES, Rules
from vdx.train.objectives import Objective
from vdx.train.optim import Optimizer
from vdx.train.state import TrainState
from vdx.types import Params

__all__ = ["FrozenWeights", "InitialParams", "TrainJob", "WeightSource"]


class FrozenWeights(NamedTuple):
    """The frozen part of a network, and the trained part that came in the same files."""

    frozen: Params | None = None  # on the mesh; None: everything is trained
    trained: Params | None = None  # trained parameters that the files hold; None: none
    digest: str | None = None  # of the frozen arrays as read; a resumed run requires the same


class InitialParams(NamedTuple):
    """The parameters that a run starts from at step 0."""

    params: Params | None  # None, or without some of the trained parameters: those start new
    origin: str  # where they come from, for the log


class WeightSource(Protocol):
    """The weights that a run starts from.

    `vdx.weights.StartingWeights` reads those of a config.
    """

    @property
    def resume(self) -> str | None:
        """A run whose state and position in the data are continued, or None."""
        ...

    def open_frozen(self, mesh: Mesh) -> FrozenWeights:
        """Read what the run does not train."""
        ...

    def open_initial(self, mesh: Mesh, abstract: Params, frozen: FrozenWeights) -> InitialParams:
        """Read the first values of the trained parameters, whose shapes are `abstract`."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A run as the loop sees it."""

    config: Mapping[str, Any]  # the resolved config, which the loop writes into the workdir
    settings: TrainSection  # lengths, intervals and limits of the run
    objective: Objective  # batch -> losses
    optimizer: Optimizer  # the learning rate's schedule, and steps of accumulation
    tx: optax.GradientTransformation  # the optimizer's update
    init_state: Callable[[Params | None], TrainState]  # step 0; traceable, so that jit shards it
    open_batches: Callable[..., Batches]  # open_batches(workdir=...) -> this process's share
    loader: Loader  # batch sizes, which the mesh has to divide
    weights: WeightSource  # what the run starts from
    sharding_rules: Rules = PARAM_RULES  # regex of a parameter's path -> mesh axes
