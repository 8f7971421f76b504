"""Checkpoints by Orbax that are verified when they are read.

A step holds four items: `params` and `ema` (either is all that sampling needs), `rest` (what
else is in TrainState) and `facts` (JSON: where the run was, and the shape, dtype and fingerprint
of every array, under a checksum of its own). Saves run in the background; `close` waits.

Orbax reads a file with a flipped bit as other values, without an error. Here a step that does
not verify is named, moved to `<workdir>/damaged`, and the next older one takes its place.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from vdx.parallel import path_str
from vdx.train.checksum import Leaf, describe, digest, fingerprints
from vdx.train.state import TrainState
from vdx.types import Params

__all__ = ["CheckpointError", "Checkpoints", "check_base", "locate"]

REST = ("step", "opt_state", "key", "norm", "accepted")


# Orbax leaves tasks behind whose errors, which we raise and explain, asyncio prints as well.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or is not there, or not of this model."""


class _Damaged(Exception):
    """A step that does not give back what was saved."""


class Checkpoints:
    """The checkpoints under `<workdir>/checkpoints`.

    keep: the newest steps that are kept. keep_every: also every step that is a multiple of it.
    best: the name of a metric; the step at which it was lowest is kept too.
    read_only: nothing is written or moved, as behoves another run's workdir.
    """

    def __init__(
        self,
        workdir: str | Path,
        keep: int = 2,
        keep_every: int = 0,
        best: str = "",
        read_only: bool = False,
    ):
        self.workdir, self.best, self.read_only = Path(workdir).absolute(), best, read_only
        self.path = self.workdir / "checkpoints"
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        if best:
            kept.append(
                policies.BestN(
                    get_metric_fn=self._metric,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if read_only and not self.path.is_dir():
            raise CheckpointError(self._none())
        self.manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                # Without best_fn Orbax keeps no metrics on disk, and after a restart no best step.
                best_fn=self._metric if best else None,
                best_mode="min",
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(str(failed))  # the first error is the one to see

    def _metric(self, metrics: Mapping[str, float]) -> float:
        return metrics[self.best]

    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        return self.manager.latest_step()

    # Writing

    def save(
        self,
        step: int,
        state: TrainState,
        progress: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save; `progress` and `metrics` are JSON values.

        Raises CheckpointError if this save cannot begin or the one before did not succeed.
        """
        items = {
            "params": state.params,
            "ema": state.ema,
            "rest": {name: getattr(state, name) for name in REST},
        }
        # A copy: Orbax writes it later, and the window of the log grows meanwhile.
        facts = {"progress": copy.deepcopy(dict(progress)), "leaves": describe(items)}
        if step <= (self.latest() or -1):  # Orbax would return False, or complain of rivals
            raise CheckpointError(
                f"Step {step} was not saved: {self.path} already holds step {self.latest()}."
            )
        try:
            begun = self.manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    facts=ocp.args.JsonSave({**facts, "sha256": digest(facts)}),
                ),
                metrics=dict(metrics) if metrics and self.best else None,
                force=True,
            )
        except Exception as error:
            raise self._failed(step, error) from error
        if not begun:
            raise self._failed(step, RuntimeError("Orbax declined"))

    def wait(self) -> None:
        """Until the last save is on disk; raises CheckpointError if it did not succeed."""
        try:
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
        except Exception as error:
            raise self._failed("in progress", error) from error

    def close(self) -> None:
        """Waits for the last save; raises CheckpointError if it did not succeed."""
        try:
            self.wait()
        finally:
            try:
                self.manager.close()
            except Exception as error:  # it also waits, and may be the first to notice
                raise self._failed("in progress", error) from error

    def delete_after(self, step: int) -> None:
        """Removes the steps beyond `step`, which a run that goes back there will make again."""
        self.wait()  # or one would be removed while it is written
        for later in (s for s in self.steps() if s > step):
            self.manager.delete(later)

    def _failed(self, step: int | str, error: Exception) -> CheckpointError:
        there = sorted(int(p.name) for p in self.path.glob("[0-9]*") if p.name.isdigit())
        return CheckpointError(
            f"Saving step {step} to {self.path} failed: {error}\nSteps that are whole there: "
            f"{', '.join(map(str, there)) or 'none'}. Make room or mend the disk, then run the "
            "same command again: it goes on from the newest of them."
        )

    # Reading

    def restore(
        self, like: TrainState, step: int | None = None, before: int | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, progress) of `step`, or of the newest that verifies, below `before` if given;
        None if there is no step at all.

        `like` is abstract, with shardings of any mesh. Raises CheckpointError if `step` is not
        there or damaged, if no step verifies, or if a step holds other arrays than `like`.
        """
        abstract = {
            "params": like.params,
            "ema": like.ema,
            "rest": {name: getattr(like, name) for name in REST},
        }
        found = self._find(abstract, step, before)
        if found is None:
            return None
        _, items, facts = found
        return (
            like.replace(params=items["params"], ema=items["ema"], **items["rest"]),
            facts["progress"],
        )

    def restore_params(
        self, like: Params, item: str = "ema", step: int | None = None
    ) -> tuple[Params, int, str]:
        """(parameters, step, identity) of the item "ema" or "params", for sampling.

        Of the newest step that verifies, or of `step`. The identity is a digest of the
        fingerprints, the same for the same weights. Raises CheckpointError.
        """
        found = self._find({item: like}, step)
        if found is None:
            raise CheckpointError(self._none())
        step, items, facts = found
        identity = digest(
            [
                [path, leaf]
                for path, leaf in sorted(facts["leaves"].items())
                if path.startswith(f"{item}/")
            ]
        )
        return items[item], step, identity

    def best_step(self) -> int:
        """The step whose metric `best` is lowest. Raises CheckpointError if none was measured."""
        step = self.manager.best_step() if self.best else None
        if step is None:
            raise CheckpointError(
                f"{self.path} has no best step: set config.train.best_metric to a "
                "metric such as 'validation/loss' when training."
            )
        return step

    def _none(self) -> str:
        return (
            f"No checkpoint in {self.path}. Train there first: "
            "python -m vdx.main --config=... --workdir=..."
        )

    def _find(self, abstract: Mapping[str, Any], step: int | None, before: int | None = None):
        """(step, items, facts) of `step`, or of the newest that verifies; None if there is none."""
        if step is None:
            return self._newest(abstract, before)
        if step not in self.steps():
            raise CheckpointError(
                f"{self.path} holds no step {step}; it holds "
                f"{', '.join(map(str, self.steps())) or 'none'}."
            )
        try:
            return step, *self._read(step, abstract)
        except _Damaged as error:
            raise CheckpointError(f"Step {step} of {self.path} is damaged: {error}") from error

    def _newest(self, abstract: Mapping[str, Any], before: int | None):
        steps = [s for s in reversed(self.steps()) if before is None or s < before]
        for step in steps:
            try:
                return step, *self._read(step, abstract)
            except _Damaged as error:
                moved = "" if self.read_only else f" Moved to {self._aside(step)}."
                logging.warning(
                    "Checkpoint %s is damaged: %s.%s", self.path / str(step), error, moved
                )
        if steps and before is None:
            raise CheckpointError(
                f"None of the steps {steps} of {self.path} verifies; the warnings above say why. "
                "Copy an undamaged step there, or start again in another workdir."
            )
        return None

    def _aside(self, step: int) -> Path:
        """Moves a damaged step away: its place will be needed again, and it may be of use."""
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

    def _read(self, step: int, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], dict]:
        """(items, facts) of a step. Raises _Damaged, or CheckpointError for another model's."""
        facts = self.facts(step)
        check_same(abstract, facts["leaves"], self.path / str(step))
        try:
            restored = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
                ),
            )
        except Exception as error:  # whatever Orbax and TensorStore say of such files
            raise _Damaged(f"it cannot be read: {type(error).__name__}: {error!s:.300}") from error
        items = {name: restored[name] for name in abstract}
        wrong = [
            path for path, value in fingerprints(items).items() if value != facts["leaves"][path][2]
        ]
        if wrong:
            raise _Damaged(f"{len(wrong)} arrays are not what was saved: {_some(wrong)}")
        return items, facts

    def facts(self, step: int) -> dict[str, Any]:
        """What JSON says of a step: {"progress": ..., "leaves": {path: Leaf}}."""
        try:
            facts = dict(
                self.manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))[
                    "facts"
                ]
            )
        except Exception as error:
            raise _Damaged(
                f"facts cannot be read: {type(error).__name__}: {error!s:.300}"
            ) from error
        if facts.pop("sha256", None) != digest(facts):
            raise _Damaged("facts are not what was saved")
        return facts


def check_same(abstract: Any, leaves: Mapping[str, Leaf], where: Path) -> None:
    """Raises CheckpointError that lists every array that a checkpoint lacks, or holds with
    another shape or dtype: Orbax would leave it out, pad or convert it."""
    wanted = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    held = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] in abstract}
    problems = [
        f"{path} {tuple(wanted[path].shape)}: not in the checkpoint"
        for path in wanted
        if path not in held
    ]
    problems += [
        f"{path} {tuple(held[path][0])}: not in this model" for path in held if path not in wanted
    ]
    problems += [
        f"{path} {held[path][1]}{tuple(held[path][0])}: this model has "
        f"{leaf.dtype}{tuple(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in held
        and (list(leaf.shape), str(leaf.dtype)) != (list(held[path][0]), held[path][1])
    ]
    if problems:
        raise CheckpointError(
            f"{where} is of another model or optimizer than this config's:\n  "
            f"{_some(problems, 20, chr(10) + '  ')}\nSet the config that it was "
            "trained with, or start in another workdir."
        )


def check_base(progress: Mapping[str, Any], base: str | None, where: str) -> None:
    """Raises CheckpointError if what a step trained was beside other weights than those of the
    digest `base`."""
    if progress.get("weights") != base:
        raise CheckpointError(
            f"The parameters of {where} were trained beside other weights than those that "
            "config.weights names now (or in another type: config.model.backbone.dtype). Name "
            "those that they were trained beside."
        )


def _some(names: Sequence[str], most: int = 5, between: str = ", ") -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return between.join([*names[:most], *more])


def locate(path: str | Path) -> tuple[Path, int | None]:
    """(workdir, step) that `runs/a`, `runs/a/checkpoints` or `runs/a/checkpoints/500` names."""
    path = Path(path)
    step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
    path = path.parent if step is not None else path
    return (path.parent if path.name == "checkpoints" else path), step
