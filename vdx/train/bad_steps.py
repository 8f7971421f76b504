"""Refused steps: the current streak, its records, and when a run gives up."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vdx.files import append_rows, host_file
from vdx.train.compile import StepCost
from vdx.train.step import Metrics

__all__ = ["BadNumbers", "BadSteps", "PendingStep"]


class BadNumbers(ValueError):
    """Too many refused batches in a row, even after going back; the message has names."""


@dataclasses.dataclass
class PendingStep:
    """A step that was dispatched and whose metrics have not been read yet."""

    step: int  # the step count after it
    position: int  # of its batch in the data
    keys: list[str]  # names of this process's records in the batch
    metrics: Metrics = dataclasses.field(default_factory=dict)  # on the devices
    cost: StepCost = dataclasses.field(default_factory=StepCost)

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of a refused step."""
        return {"step": self.step, "position": self.position, "keys": self.keys}


class BadSteps:
    """The refused steps in a row, and how often the run went back to a checkpoint."""

    def __init__(self, workdir: Path, limit: int, max_rollbacks: int):
        self.path = host_file(workdir / "refused_batches.jsonl", jax.process_index())
        self.limit = limit
        self.max_rollbacks = max_rollbacks
        self.streak: list[PendingStep] = []
        self.rollbacks = 0

    def resume_from(self, progress: Mapping[str, Any]) -> None:
        """Take over the streak that a checkpoint holds."""
        self.streak = [PendingStep(**record) for record in progress["bad"]]
        self.rollbacks = progress["rollbacks"]

    def progress(self) -> dict[str, Any]:
        """Return the streak as a checkpoint holds it."""
        return {"bad": [step.record() for step in self.streak], "rollbacks": self.rollbacks}

    @property
    def is_full(self) -> bool:
        """Enough steps in a row were refused for the run to go back."""
        return len(self.streak) >= self.limit

    def accept(self) -> None:
        """End the streak."""
        self.streak = []

    def refuse(self, done: PendingStep, metrics: Mapping[str, Any]) -> str:
        """Add a refused step and write its records down; return a line for the log.

        Every process names the records of its own share of the batch.
        """
        self.streak.append(done)
        row = {
            "step": done.step,
            "position": done.position,
            "host": jax.process_index(),
            "loss": str(metrics["loss"]),
            "grad_norm": str(metrics["grad_norm"]),
            "keys": done.keys,
        }
        append_rows(self.path, [row])
        return (
            f"Step {done.step} refused: loss {metrics['loss']:.4g}, gradient norm "
            f"{metrics['grad_norm']:.4g}. See {self.path}"
        )

    def begin_rollback(self) -> int:
        """End the streak and counts a rollback; return the first refused step.

        Raises BadNumbers, which names the batches, after the last allowed rollback.
        """
        if self.rollbacks >= self.max_rollbacks:
            raise BadNumbers(self._explanation())
        first = self.streak[0].step
        self.streak = []
        self.rollbacks += 1
        return first

    def _explanation(self) -> str:
        """Return the message of BadNumbers."""
        names = "".join(
            f"\n  step {bad.step}, batch {bad.position}: {', '.join(bad.keys)}"
            for bad in self.streak
        )
        return (
            f"{len(self.streak)} batches in a row gave a loss or a gradient that is not finite, "
            f"or spikes, after going back {self.rollbacks} times. Look at these records, or "
            "lower the learning rate; config.train.max_grad_norm_ratio, max_bad_steps and "
            "max_rollbacks set the limits. refused_batches.jsonl has the numbers:" + names
        )
