"""The weights that a run starts from, and those that a trained run leaves behind.

`StartingWeights` reads what `config.weights`, `init`, `lora` and `trainable` name.
`open_params` and `open_trained` read the checkpoints of a run, to draw with or to export.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vdx.config.build import ConfigError
from vdx.config.sections import TrainSection
from vdx.files import read_npy
from vdx.interop.load import abstract_params
from vdx.interop.transformer import load_transformer
from vdx.interop.unet import load_unet
from vdx.models.adapters.lora import Lora, add_deltas, dense_kernels
from vdx.models.adapters.trainable import Trainable, overlay
from vdx.models.conditioning.text_signals import NULL, Embeddings
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes, trace_once
from vdx.train.checkpoint import Checkpoints, RestoredParams, locate
from vdx.train.checkpoint_match import CheckpointError, check_base
from vdx.train.checksum import digest, whole_digest
from vdx.train.job import FrozenWeights, InitialParams
from vdx.train.objectives import Objective
from vdx.types import Params, PRNGKeyArray

__all__ = ["OpenedParams", "SplitWeights", "StartingWeights", "open_params", "open_trained"]

# name of a backbone -> the function that reads its pretrained files.
READERS: dict[str, Callable[..., Params]] = {"transformer": load_transformer, "unet": load_unet}


class SplitWeights(NamedTuple):
    """A pretrained network, split into what is frozen and what is trained."""

    frozen: Params
    trained: Params | None  # the trained parameters that the files hold; None for adapters


@dataclasses.dataclass(frozen=True)
class StartingWeights:
    """The weights that a run starts from, as its config names them."""

    model: Denoiser
    trained_part: Lora | Trainable | None  # the part that is trained; None: the whole network
    # config.weights: files of a pretrained network, or a run; None: new parameters.
    path: str | tuple[str, ...] | None
    resume: str | None  # config.resume: a run that is continued
    init: str | None  # config.init: a run whose averaged parameters are the first ones
    metadata: Callable[[], Mapping[str, Any]]  # of the training data; may hold `null`

    @functools.cached_property
    def shapes(self) -> Params:
        """The network's parameters, abstract; raises ConfigError if it cannot be built."""
        return new_shapes(self.model)

    @functools.cached_property
    def kernels(self) -> dict[str, Any]:
        """path -> abstract kernel that adapters act on; empty without adapters."""
        if not isinstance(self.trained_part, Lora):
            return {}
        trace = lambda: dense_kernels(self.model.new_params)
        return self.trained_part.select_kernels(trace_once(self.model, ("kernels",), trace))

    def new_params(self, key: PRNGKeyArray) -> Params:
        """Return new values of what is trained: all parameters, some, or adapters."""
        if isinstance(self.trained_part, Lora):
            return self.trained_part.new_factors(key, self.kernels)
        params = self.model.new_params(key)
        if self.trained_part is None:
            return params
        _, trained = self.trained_part.split(params)
        return trained

    def new_shapes(self) -> Params:
        """Return the shapes of `new_params`."""
        return jax.eval_shape(self.new_params, jax.random.key(0))

    # The pretrained network

    def read_weights(self, mesh: Mesh) -> Params:
        """Read the network that `config.weights` names, onto the mesh.

        Trained parameters are float32, frozen ones have the network's type. Parameters that
        `config.trainable` names and the files lack are left out.

        Raises ConfigError, WeightsError, CheckpointError.
        """
        if not self.path:
            raise ConfigError(
                "config.weights is not set: name the network whose weights stay frozen, "
                "a folder of pretrained weights or a run."
            )

        # Everything trained: float32. A part trained: only that part is (see `trained`).
        dtype = "float32" if self.trained_part is None else self.model.backbone.dtype
        trained = self.trained_part.pattern if isinstance(self.trained_part, Trainable) else None

        # A run, or files of pretrained weights
        if isinstance(self.path, str):
            workdir, step = locate(self.path)
            if (workdir / "checkpoints").is_dir():
                return self._read_run(workdir, step, mesh, dtype, trained)
        read = READERS[self.model.backbone_config["name"]]
        return read(self.path, self.model, mesh, dtype, trained)

    def _read_run(
        self, workdir: Path, step: int | None, mesh: Mesh, dtype: str, trained: str | None
    ) -> Params:
        """Read the averaged parameters of a run, in the types of a pretrained network."""
        with Checkpoints(workdir, read_only=True) as run:
            restored = run.restore_params(abstract_params(self.shapes, mesh), step=step)
        wanted = abstract_params(self.shapes, mesh, dtype, trained)
        return jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), restored.params, wanted)

    def read_frozen(self, mesh: Mesh) -> SplitWeights:
        """Read the pretrained network and split it into frozen and trained parameters."""
        weights = self.read_weights(mesh)
        if isinstance(self.trained_part, Trainable):
            return SplitWeights(*self.trained_part.split(weights))
        return SplitWeights(weights, None)

    def abstract_frozen(self, mesh: Mesh) -> Params | None:
        """Return the shapes and shardings of the frozen weights; None if all is trained."""
        if self.trained_part is None:
            return None
        dtype = self.model.backbone.dtype
        if isinstance(self.trained_part, Lora):
            return abstract_params(self.shapes, mesh, dtype)
        shapes = abstract_params(self.shapes, mesh, dtype, self.trained_part.pattern)
        frozen, _ = self.trained_part.split(shapes)
        return frozen

    def with_null(self, params: Params) -> Params:
        """Set the embedding of a dropped caption from the metadata of cached text.

        Files of pretrained weights do not have it, and it is zero as they are read.
        Raises ConfigError if it is needed and missing.
        """
        leaves = flatten_dict(params, sep="/")
        if NULL not in leaves or np.any(leaves[NULL]):
            return params
        null = self.metadata().get("null")
        if null is not None:
            return add_deltas(params, {NULL: np.asarray(null, np.float32)})
        rate = self.model.signals["embeddings"].get("dropout", Embeddings.dropout)
        if rate:
            raise ConfigError(
                f"config.model.signals.embeddings.dropout = {rate} drops captions, and the "
                "metadata of the data lacks `null`, the encoding of the empty caption that "
                "replaces them (see vdx.data.records). Write it there, or set the dropout to 0."
            )
        return params

    def describe_initialisation(self, given: Params) -> str:
        """Count the trained arrays that were read, and those that start new."""
        names = flatten_dict(self.new_shapes(), sep="/")
        read = len(flatten_dict(given, sep="/"))
        return f"{read} trained arrays that were read and {len(names) - read} new ones"

    # For the training loop (vdx.train.job.WeightSource)

    def open_frozen(self, mesh: Mesh) -> FrozenWeights:
        """Read what the run does not train."""
        if self.trained_part is None:
            return FrozenWeights()
        frozen, trained = self.read_frozen(mesh)
        # The digest is that of the files: the data's `null` may be missing when a run is opened.
        return FrozenWeights(self.with_null(frozen), trained, whole_digest(frozen))

    def open_initial(self, mesh: Mesh, abstract: Params, frozen: FrozenWeights) -> InitialParams:
        """Read the first values of the trained parameters, whose shapes are `abstract`.

        They come from `config.init`, else from `config.weights`; what neither holds starts new.
        """
        # The averaged parameters of another run
        if self.init:
            path, step = locate(self.init)
            with Checkpoints(path, read_only=True) as run:
                restored = run.restore_params(abstract, step=step)
            origin = f"the averaged weights of {self.init}, step {restored.step}"
            return InitialParams(restored.params, origin)

        # A part of a pretrained network
        if isinstance(self.trained_part, Lora):
            return InitialParams(None, f"new adapters for the weights of {self.path}")
        if isinstance(self.trained_part, Trainable):
            trained = self.read_frozen(mesh).trained if frozen.trained is None else frozen.trained
            assert trained is not None
            counts = self.describe_initialisation(trained)
            return InitialParams(trained, f"{counts}, in the network of {self.path}")

        # A whole network
        if self.path:
            params = self.with_null(self.read_weights(mesh))
            return InitialParams(params, f"the weights of {self.path}")
        return InitialParams(None, "new weights")

    def complete(self, params: Params | None, key: PRNGKeyArray) -> Params:
        """Add new parameters where the given ones lack some; traceable."""
        if params is None or self.trained_part is not None:
            return overlay(self.new_params(key), params or {})
        return params


# Trained runs


class TrainedExperiment(Protocol):
    """The parts of a `vdx.experiment.Experiment` that opening its run requires."""

    @property
    def weights(self) -> StartingWeights:
        """The weights that the run started from."""
        ...

    @property
    def training(self) -> TrainSection:
        """The section `config.train`."""
        ...

    @property
    def objective(self) -> Objective:
        """The objective, which combines trained and frozen parameters."""
        ...


class OpenedParams(NamedTuple):
    """The parameters that a run's network is evaluated with."""

    params: Any  # on the mesh, the frozen ones included: Params, or Adapted
    step: int
    identity: str  # the same for the same weights


def open_params(
    experiment: TrainedExperiment,
    workdir: Path,
    mesh: Mesh,
    *,
    item: str = "ema",
    step: int | str | None = None,
) -> OpenedParams:
    """Read the parameters of a checkpoint, on the mesh.

    Where only a part was trained, the frozen weights are read again from `config.weights`.

    Args:
      item: "ema", the averaged parameters, or "params".
      step: a number, "best", or None for the newest that verifies.

    Raises CheckpointError.
    """
    trained, number, identity = open_trained(experiment, workdir, mesh, item=item, step=step)
    weights = experiment.weights
    if weights.trained_part is None:
        return OpenedParams(trained, number, identity)

    # The frozen weights, which must be those of training
    frozen, _ = weights.read_frozen(mesh)
    base = whole_digest(frozen)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        progress = checkpoints.facts(number)["progress"]
    check_base(progress, base, f"step {number} of {workdir}")

    # The run kept the embedding of dropped captions: its data may not be here.
    saved_null = Path(workdir) / "null.npy"
    if saved_null.exists():
        frozen = add_deltas(frozen, {NULL: np.asarray(read_npy(saved_null))})
    params = experiment.objective.network_params(trained, frozen)
    return OpenedParams(params, number, digest([identity, base]))


def parse_step(step: int | str | None) -> int | None:
    """Return the number of a step. Raises CheckpointError for other text."""
    if step is None or str(step).isdecimal():
        return None if step is None else int(step)
    raise CheckpointError(f"step = {step!r} is neither the number of a step nor 'best'.")


def open_trained(
    experiment: TrainedExperiment,
    workdir: Path,
    mesh: Mesh,
    *,
    item: str = "ema",
    step: int | str | None = None,
) -> RestoredParams:
    """Read what a run trained: the network's parameters, some of them, or adapters.

    The arguments are those of `open_params`. Raises CheckpointError.
    """
    if item not in ("ema", "params"):
        raise CheckpointError(f"The weights of a step are 'ema' or 'params', not {item!r}.")
    abstract = abstract_params(experiment.weights.new_shapes(), mesh)
    best_metric = experiment.training.best_metric
    number = None if step == "best" else parse_step(step)
    with Checkpoints(workdir, best_metric=best_metric, read_only=True) as checkpoints:
        number = checkpoints.best_step() if step == "best" else number
        return checkpoints.restore_params(abstract, item, number)
