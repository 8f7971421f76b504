"""The state that a run starts with: a checkpoint, its own or another's, or step 0."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from vdx.train.checkpoint import Checkpoints, locate
from vdx.train.checkpoint_match import CheckpointError, check_base
from vdx.train.job import FrozenWeights, TrainJob
from vdx.train.state import TrainState

__all__ = ["Start", "init_state", "start_state"]


class Start(NamedTuple):
    """A state to train from."""

    state: TrainState
    progress: Mapping[str, Any] | None  # what the checkpoint holds besides arrays; None: step 0
    origin: str  # a line for the log


def start_state(
    job: TrainJob,
    workdir: Path,
    mesh: Mesh,
    checkpoints: Checkpoints,
    abstract_state: TrainState,
    frozen: FrozenWeights,
) -> Start:
    """Resume from the workdir, else from `config.resume`, else start at step 0.

    Raises CheckpointError for a resumed run without checkpoints, and for a checkpoint that was
    trained with other frozen weights.
    """
    # The run itself, interrupted or finished
    found = checkpoints.restore(abstract_state)
    if found:
        return _resumed(found, str(workdir), frozen)

    # The run that the config continues
    if job.weights.resume:
        path, step = locate(job.weights.resume)
        with Checkpoints(path, read_only=True) as other:
            found = other.restore(abstract_state, step)
        if found is None:
            raise CheckpointError(
                f"config.resume = {job.weights.resume!r}: {path} has no checkpoint."
            )
        return _resumed(found, job.weights.resume, frozen)

    # A new run
    return init_state(job, mesh, abstract_state, frozen)


def init_state(
    job: TrainJob, mesh: Mesh, abstract_state: TrainState, frozen: FrozenWeights
) -> Start:
    """Make the state at step 0, on the mesh, from the job's starting weights."""
    params, origin = job.weights.open_initial(mesh, abstract_state.params, frozen)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    init = jax.jit(job.init_state, out_shardings=shardings, donate_argnums=0)
    return Start(init(params), None, f"Starts with {origin}.")


def _resumed(
    found: tuple[TrainState, Mapping[str, Any]], name: str, frozen: FrozenWeights
) -> Start:
    """Check that a restored state belongs to these frozen weights."""
    state, progress = found
    step = int(state.step)
    check_base(progress, frozen.digest, f"step {step}")
    return Start(state, progress, f"Resumes from step {step} of {name}.")
