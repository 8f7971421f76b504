"""Checkpoints by Orbax that are verified when they are read.

A step holds four items: `params` and `ema` (either is all that sampling needs), `rest` (what
else is in TrainState) and `facts` (JSON: the progress of the run, and the shape, dtype and
fingerprint of every array, under a checksum of its own). Saves run in the background; `close`
waits.

Orbax reads a file with a flipped bit as other values, without an error. Here a step that does
not verify is named, moved to `<workdir>/damaged`, and the next older one takes its place.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from vdx.train.checkpoint_match import CheckpointError, check_same, shorten
from vdx.train.checksum import describe, digest, fingerprints
from vdx.train.state import TrainState
from vdx.types import Params

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Restored",
    "RestoredParams",
    "RunStep",
    "locate",
]

REST = ("step", "opt_state", "key", "norm", "accepted")  # TrainState less `params` and `ema`

# Orbax leaves tasks behind whose errors asyncio prints; CheckpointError reports them already.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _Damaged(Exception):
    """A step that does not give back what was saved."""


class Restored(NamedTuple):
    """A whole checkpoint."""

    state: TrainState
    progress: dict[str, Any]  # as it was given to `save`


class RestoredParams(NamedTuple):
    """The parameters of a checkpoint, for sampling."""

    params: Params
    step: int
    identity: str  # a digest of the fingerprints: the same for the same weights


class _Verified(NamedTuple):
    """The items of a step that verified."""

    step: int
    items: dict[str, Any]
    facts: dict[str, Any]  # {"progress": ..., "leaves": {path: Leaf}}


class RunStep(NamedTuple):
    """A run, and perhaps one of its steps."""

    workdir: Path
    step: int | None  # None: the newest


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`; a context manager.

    Args:
      max_to_keep: how many of the newest steps are kept.
      keep_period: steps that are multiples of it are kept too; 0: none.
      best_metric: the step at which this metric was lowest is kept too; "": none.
      read_only: nothing is written or moved, as another run's workdir requires.
    """

    def __init__(
        self,
        workdir: str | Path,
        max_to_keep: int = 2,
        keep_period: int = 0,
        best_metric: str = "",
        read_only: bool = False,
    ):
        self.workdir = Path(workdir).absolute()
        self.path = self.workdir / "checkpoints"
        self.best_metric = best_metric
        self.read_only = read_only

        # A run that is only read has to exist.
        if read_only and not self.path.is_dir():
            raise CheckpointError(self._none())

        self.manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._preservation(max_to_keep, keep_period),
                # Without best_fn Orbax keeps no metrics on disk, and after a restart no best step.
                best_fn=self._metric if best_metric else None,
                best_mode="min",
                # Another run may be in the middle of a save.
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # the first error is the one to see

    def _preservation(self, max_to_keep: int, keep_period: int) -> policies.AnyPreservationPolicy:
        """Return Orbax's policy for the steps that are kept."""
        kept: list[Any] = [policies.LatestN(max_to_keep)]
        if keep_period:
            kept.append(policies.EveryNSteps(keep_period))
        if self.best_metric:
            best = policies.BestN(
                get_metric_fn=self._metric,
                reverse=True,  # the lowest is the best
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        return policies.AnyPreservationPolicy(kept)

    def _metric(self, metrics: Mapping[str, float]) -> float:
        """Return the metric that decides which step is best."""
        return metrics[self.best_metric]

    def steps(self) -> list[int]:
        """Return the steps that are there, the oldest first."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """Return the newest step, or None."""
        return self.manager.latest_step()

    # Writing

    def save(
        self,
        step: int,
        state: TrainState,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save a step; `progress` and `metrics` are JSON values.

        Raises CheckpointError if this save cannot begin or the previous one did not succeed.
        """
        # Orbax would return False, or report a rival writer.
        if step <= (self.latest() or -1):
            raise CheckpointError(
                f"Step {step} was not saved: {self.path} already holds step {self.latest()}."
            )

        items = _items(state)
        # A copy: Orbax writes it later, and the metrics of the log grow meanwhile.
        facts = {"progress": copy.deepcopy(dict(progress)), "leaves": describe(items)}
        arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        signed = ocp.args.JsonSave({**facts, "sha256": digest(facts)})

        # An evaluation that was refused has no metric.
        if self.best_metric not in (metrics or {}):
            metrics = None

        # `force` skips Orbax's own rules of when to save: the loop decides.
        try:
            begun = self.manager.save(
                step,
                args=ocp.args.Composite(**arrays, facts=signed),
                metrics=dict(metrics) if metrics else None,
                force=True,
            )
        except Exception as error:
            raise self._failed(step, error) from error
        if not begun:
            raise self._failed(step, RuntimeError("Orbax declined"))

    def wait(self) -> None:
        """Wait until the last save is on disk; raise CheckpointError if it failed."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed("in progress", error) from error

    def close(self) -> None:
        """Wait for the last save and close; raise CheckpointError if the save failed."""
        try:
            self.wait()
        finally:
            try:
                self.manager.close()
            except Exception as error:  # closing waits too, and may be the first to fail
                raise self._failed("in progress", error) from error

    def delete_after(self, step: int) -> None:
        """Remove the steps beyond `step`, which a run that goes back there makes again."""
        self.wait()  # a step must not be removed while it is written
        for later in self.steps():
            if later > step:
                self.manager.delete(later)

    def _failed(self, step: int | str, error: Exception) -> CheckpointError:
        """Return the error of a save, with the steps that can be resumed from."""
        there = sorted(int(p.name) for p in self.path.glob("[0-9]*") if p.name.isdigit())
        return CheckpointError(
            f"Saving step {step} to {self.path} failed: {error}\nSteps that are whole there: "
            f"{', '.join(map(str, there)) or 'none'}. Make room or repair the disk, then run the "
            "same command again: it resumes from the newest of them."
        )

    # Reading

    def restore(
        self, abstract_state: TrainState, step: int | None = None, before: int | None = None
    ) -> Restored | None:
        """Read `step`, or the newest step that verifies, below `before` if given.

        Returns None if there is no step at all. The abstract state has shardings of any mesh.
        Raises CheckpointError if `step` is missing or damaged, if no step verifies, or if a step
        holds other arrays than the abstract state.
        """
        found = self._find(_items(abstract_state), step, before)
        if found is None:
            return None
        items = found.items
        state = abstract_state.replace(params=items["params"], ema=items["ema"], **items["rest"])
        return Restored(state, found.facts["progress"])

    def restore_params(
        self, abstract: Params, item: str = "ema", step: int | None = None
    ) -> RestoredParams:
        """Read the item "ema" or "params" of `step`, or of the newest step that verifies.

        Raises CheckpointError.
        """
        found = self._find({item: abstract}, step)
        if found is None:
            raise CheckpointError(self._none())
        leaves = sorted(found.facts["leaves"].items())
        own = [[path, leaf] for path, leaf in leaves if path.startswith(f"{item}/")]
        return RestoredParams(found.items[item], found.step, digest(own))

    def best_step(self) -> int:
        """Return the step with the lowest best_metric; raise CheckpointError without one."""
        step = self.manager.best_step() if self.best_metric else None
        if step is None:
            raise CheckpointError(
                f"{self.path} has no best step: set config.train.best_metric to a "
                "metric such as 'validation/loss' when training."
            )
        return step

    def facts(self, step: int) -> dict[str, Any]:
        """Read the JSON of a step: {"progress": ..., "leaves": {path: Leaf}}."""
        try:
            args = ocp.args.Composite(facts=ocp.args.JsonRestore())
            facts = dict(self.manager.restore(step, args=args)["facts"])
        except Exception as error:
            raise _Damaged(
                f"facts cannot be read: {type(error).__name__}: {error!s:.300}"
            ) from error
        if facts.pop("sha256", None) != digest(facts):
            raise _Damaged("facts are not what was saved")
        return facts

    def _none(self) -> str:
        """Return the message for a workdir without checkpoints."""
        return (
            f"No checkpoint in {self.path}. Train there first: "
            "python -m vdx.main --config=... --workdir=..."
        )

    def _find(
        self, abstract: Mapping[str, Any], step: int | None, before: int | None = None
    ) -> _Verified | None:
        """Read `step`, or the newest step that verifies; return None if there is none."""
        if step is None:
            return self._newest(abstract, before)
        if step not in self.steps():
            raise CheckpointError(
                f"{self.path} holds no step {step}; it holds "
                f"{', '.join(map(str, self.steps())) or 'none'}."
            )
        try:
            return self._read(step, abstract)
        except _Damaged as error:
            raise CheckpointError(f"Step {step} of {self.path} is damaged: {error}") from error

    def _newest(self, abstract: Mapping[str, Any], before: int | None) -> _Verified | None:
        """Read the newest step that verifies; move damaged steps away."""
        steps = [s for s in reversed(self.steps()) if before is None or s < before]
        for step in steps:
            try:
                return self._read(step, abstract)
            except _Damaged as error:
                moved = "" if self.read_only else f" Moved to {self._move_away(step)}."
                logging.warning(
                    "Checkpoint %s is damaged: %s.%s", self.path / str(step), error, moved
                )
        if steps and before is None:
            raise CheckpointError(
                f"None of the steps {steps} of {self.path} verifies; the warnings above say why. "
                "Copy an undamaged step there, or start again in another workdir."
            )
        return None

    def _move_away(self, step: int) -> Path:
        """Move a damaged step to `<workdir>/damaged`: a new step takes its place."""
        folder = self.workdir / "damaged"
        target = folder / f"{step}"
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "+")
            (self.path / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("vdx: a damaged checkpoint was moved")
        self.manager.reload()
        return target

    def _read(self, step: int, abstract: Mapping[str, Any]) -> _Verified:
        """Read and verify a step; raise _Damaged, or CheckpointError for another model's."""
        facts = self.facts(step)
        check_same(abstract, facts["leaves"], self.path / str(step))
        args = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise _Damaged(f"it cannot be read: {type(error).__name__}: {error!s:.300}") from error
        items = {name: restored[name] for name in abstract}

        saved = facts["leaves"]
        wrong = [path for path, value in fingerprints(items).items() if value != saved[path][2]]
        if wrong:
            raise _Damaged(f"{len(wrong)} arrays are not what was saved: {shorten(wrong)}")
        return _Verified(step, items, facts)


def _items(state: TrainState) -> dict[str, Any]:
    """Split a (possibly abstract) state into the items of a checkpoint."""
    return {
        "params": state.params,
        "ema": state.ema,
        "rest": {name: getattr(state, name) for name in REST},
    }


def locate(path: str | Path) -> RunStep:
    """Split `runs/a`, `runs/a/checkpoints` or `runs/a/checkpoints/5` into run, step."""
    path = Path(path)
    step = None
    if path.name.isdigit() and path.parent.name == "checkpoints":
        step = int(path.name)
        path = path.parent
    if path.name == "checkpoints":
        path = path.parent
    return RunStep(path, step)
