"""The training loop: batches in, steps out, and the work between steps."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from vdx.data.pipeline import Batches
from vdx.data.workers import dump_workers, kill_workers
from vdx.files import write_json
from vdx.models.attention.backends import selected_backends
from vdx.models.conditioning.text_signals import NULL
from vdx.models.remat import check_remat
from vdx.parallel import put_batch
from vdx.train.bad_steps import BadNumbers, BadSteps, PendingStep
from vdx.train.checkpoint import Checkpoints
from vdx.train.compile import StepCompiler, peak_flops, train_program
from vdx.train.job import FrozenWeights, TrainJob
from vdx.train.log import Log, MetricsAccumulator
from vdx.train.preemption import Preempted, PreemptionHandler, Watchdog, exit_if_peer_lost
from vdx.train.start import Start, init_state, start_state
from vdx.train.state import TrainState
from vdx.types import Params

__all__ = ["BadNumbers", "PeriodicTask", "TrainedRun", "Trainer", "train"]


@dataclasses.dataclass(frozen=True)
class PeriodicTask:
    """Work done between steps with the averaged parameters, such as an evaluation."""

    name: str
    every: int  # steps; also run after the last step; 0: never
    # (step, averaged parameters) -> scores to log
    run: Callable[[int, Params], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """The result of a run, in memory."""

    state: TrainState
    params: Any  # the averaged parameters that the network runs with: Params, or Adapted
    seconds: float  # spent by this process, from start to end


def train(
    job: TrainJob,
    workdir: Path,
    mesh: Mesh,
    preemption: PreemptionHandler,
    *,
    evaluations: Sequence[PeriodicTask] = (),
    samples: Sequence[PeriodicTask] = (),
    facts: Mapping[str, Any] | None = None,
) -> TrainedRun:
    """Train to `config.train.steps`, and resume from the workdir's newest checkpoint.

    Evaluations run before the checkpoint of the same step: their scores are logged and decide
    which checkpoint is best. Samples run after it. Call under `jax.set_mesh(mesh)`. facts: what
    run.json says of the origin of the run.

    Raises Preempted when a stop was requested and the state is saved, BadNumbers when going
    back to a checkpoint does not help, CheckpointError, DataError.
    """
    begin = time.monotonic()
    settings = job.settings
    batches = job.open_batches(workdir=workdir)

    # Every end, also by an error, closes what is open here.
    try:
        with (
            Checkpoints(
                workdir,
                max_to_keep=settings.max_to_keep,
                keep_period=settings.keep_period,
                best_metric=settings.best_metric,
            ) as checkpoints,
            Watchdog(
                settings.watchdog_seconds,
                before_exit=(dump_workers, kill_workers, checkpoints.wait),
            ) as watchdog,
            exit_if_peer_lost(kill_workers),
        ):
            trainer = Trainer(job, workdir, mesh, batches, checkpoints, watchdog)
            # Only now: an earlier run in the workdir may not fit this config.
            if jax.process_index() == 0:
                _write_config(workdir, job, facts)

            try:
                trainer.run(preemption, evaluations, samples)
            finally:
                preemption.end_polling()  # a signal now ends the program at once
                trainer.close()
    finally:
        batches.close()

    return TrainedRun(trainer.state, trainer.averaged_params(), time.monotonic() - begin)


def _write_config(workdir: Path, job: TrainJob, facts: Mapping[str, Any] | None) -> None:
    """Write the config of a run, and the origin of the run if it is given."""
    write_json(workdir / "config.json", job.config)
    if facts is not None:
        write_json(workdir / "run.json", facts)


class Trainer:
    """The moving parts of a run: the state and its steps, checkpoints and log."""

    def __init__(
        self,
        job: TrainJob,
        workdir: Path,
        mesh: Mesh,
        batches: Batches,
        checkpoints: Checkpoints,
        watchdog: Watchdog,
    ):
        check_remat(job.objective.model.backbone.remat, jax.local_devices()[0])

        # The parts that are given
        self.job = job
        self.settings = job.settings
        self.workdir = workdir
        self.mesh = mesh
        self.batches = batches
        self.checkpoints = checkpoints
        self.watchdog = watchdog

        # All rates now: computed later, each would wait for the step in flight.
        steps = self.settings.steps
        self.rates = np.asarray(jax.vmap(job.optimizer.rate(steps))(np.arange(steps + 1)))
        self.peak = peak_flops(mesh)

        # Bookkeeping of steps
        self.bad_steps = BadSteps(workdir, self.settings.max_bad_steps, self.settings.max_rollbacks)
        self.pending: PendingStep | None = None  # dispatched, its metrics not read yet
        self.metrics = MetricsAccumulator()
        self.attention_backends: list[str] = []  # those that the log has named

        # The program and the weights that it does not change
        program = train_program(job, mesh)
        self.abstract_state = program.abstract_state
        frozen = job.weights.open_frozen(mesh)
        self.frozen = frozen.frozen
        self.frozen_digest = frozen.digest  # every checkpoint keeps it
        self.compiler = StepCompiler(
            program, self.frozen, job.objective.model, job.loader, mesh, batches.samples
        )

        # The state
        start = start_state(job, workdir, mesh, checkpoints, self.abstract_state, frozen)
        self._take_over(start)
        self._save_null(frozen)
        self.log = Log(workdir, steps, self.step)
        self.log.message(start.origin)

    # The start

    def _take_over(self, start: Start) -> None:
        """Set the state and, from a checkpoint, the place in the data and the bad steps."""
        self.state = start.state
        self.step = int(start.state.step)
        if start.progress is not None:
            self.batches.seek(start.progress["position"])
            self.metrics = MetricsAccumulator(start.progress["window"])
            self.bad_steps.resume_from(start.progress)

    def _save_null(self, frozen: FrozenWeights) -> None:
        """Save the embedding of dropped captions, which only the data holds."""
        if frozen.frozen is None or jax.process_index() != 0:
            return
        null = flatten_dict(frozen.frozen, sep="/").get(NULL)
        if null is not None:
            np.save(self.workdir / "null.npy", np.asarray(null, np.float32))

    # The loop

    def run(
        self,
        preemption: PreemptionHandler,
        evaluations: Sequence[PeriodicTask],
        samples: Sequence[PeriodicTask],
    ) -> None:
        """Take steps to the end of the run, with the work that is due after each."""
        settings = self.settings
        intervals = [settings.save_every, *(task.every for task in (*evaluations, *samples))]
        self.attention_backends = list(selected_backends())  # of the start, not of steps
        preemption.polled = True
        while self.step < settings.steps:
            self.take_step()
            self.log_attention_backends()

            # Work that reads the state first waits for the step in flight: it may be refused.
            stopping = preemption.requested()
            is_last = self.step == settings.steps
            pausing = stopping or is_last or self.is_due(*intervals)
            if pausing and not self.bad_steps.is_full:
                self.collect_pending()

            if self.bad_steps.is_full:
                self.roll_back()
                continue

            # Evaluations first: their scores decide which checkpoint is best.
            scores = self.run_due(evaluations)
            if scores:
                self.log.row(self.step, scores)

            if self.is_due(settings.save_every) or stopping:
                self.save(scores)
            if stopping:
                self.stop()

            # Samples last: a preempted run has no time for them.
            self.run_due(samples)
            self.watchdog.beat()

        # The steps since the last row
        if settings.log_every and self.metrics.rows:
            self.write_metrics(self.step)

    def is_due(self, *intervals: int) -> bool:
        """Return whether this is the last step, or a multiple of an interval; 0 is never."""
        is_last = self.step == self.settings.steps
        return any(every and (is_last or self.step % every == 0) for every in intervals)

    def run_due(self, tasks: Sequence[PeriodicTask]) -> dict[str, float]:
        """Run the tasks that are due; return their merged scores."""
        due = [task for task in tasks if self.is_due(task.every)]
        if not due:
            return {}
        params = self.averaged_params()
        scores: dict[str, float] = {}
        for task in due:
            scores |= task.run(self.step, params)
        return scores

    def averaged_params(self) -> Any:
        """Return the averaged parameters that the network runs with."""
        return self.job.objective.network_params(self.state.ema, self.frozen)

    def save(self, scores: Mapping[str, float]) -> None:
        """Begin to save a checkpoint of this step, unless there is one."""
        if self.checkpoints.latest() == self.step:
            return
        progress = {
            "position": self.batches.position,
            "window": self.metrics.rows,
            **self.bad_steps.progress(),
        }
        if self.frozen_digest:
            progress["weights"] = self.frozen_digest
        self.checkpoints.save(self.step, self.state, progress, scores or None)

    def stop(self) -> None:
        """Wait for the checkpoint of this step and raise Preempted."""
        self.log.message(f"Stopped at step {self.step}; the same command resumes from there.")
        self.checkpoints.wait()
        raise Preempted

    def close(self) -> None:
        """End the compiler's thread and the log."""
        self.compiler.close()
        self.log.close()

    # Steps

    def take_step(self) -> None:
        """Dispatch a step, then read the metrics of the one before while this one runs.

        The device so never waits for the host, and at most two steps are in flight.
        """
        batch = put_batch(self.mesh, next(self.batches))
        compiled = self.compiler(batch)
        self.state, metrics = compiled.run(self.state, batch, self.frozen)
        self.step += 1

        self.collect_pending()
        self.pending = PendingStep(
            step=self.step,
            position=self.batches.position - 1,
            keys=list(self.batches.last_keys),
            metrics=metrics,
            cost=compiled.cost,
        )
        self.log.advance()

    def collect_pending(self) -> None:
        """Read the metrics of the step in flight; accept or refuse it."""
        if self.pending is None:
            return
        done = self.pending
        self.pending = None
        metrics = jax.device_get(done.metrics)
        every = self.settings.log_every
        if every:
            self.metrics.add(metrics, done.cost)
        if metrics["ok"]:
            self.bad_steps.accept()
        else:
            self.log.message(self.bad_steps.refuse(done, metrics))
        if every and done.step % every == 0:
            self.write_metrics(done.step)

    def roll_back(self) -> None:
        """Return to the newest checkpoint before the streak of refused steps.

        The data continues where it was, so that the run reads new batches. Raises BadNumbers
        after the last allowed rollback.
        """
        first_bad = self.bad_steps.begin_rollback()
        position = self.batches.position

        # The state before the streak
        found = self.checkpoints.restore(self.abstract_state, before=first_bad)
        if found is None:
            # The trained part of the files was given to the first step: it is read again.
            frozen = FrozenWeights(self.frozen, None, self.frozen_digest)
            self.state = init_state(self.job, self.mesh, self.abstract_state, frozen).state
        else:
            self.state, _ = found
        self.step = int(self.state.step)

        # Later steps are made again, with the data that follows.
        self.checkpoints.delete_after(self.step)
        self.batches.seek(position)
        self.pending = None
        self.metrics = MetricsAccumulator(waited=self.batches.wait_seconds)

        self.log.message(
            f"{self.settings.max_bad_steps} steps in a row were refused: back to step "
            f"{self.step}, with new data."
        )
        self.log.move_back(self.step)

    # The log

    def write_metrics(self, step: int) -> None:
        """Write the row of the log that ends with this step."""
        accepted = self.metrics.rows[-1]["accepted"]
        rate = float(self.rates[accepted])
        row = self.metrics.flush(self.batches.wait_seconds, rate, self.peak)
        self.log.row(step, {**row, "train/refused": step - accepted})
        self.log.show(row)

    def log_attention_backends(self) -> None:
        """Log the attention backends that were selected since the last call."""
        new = [line for line in selected_backends() if line not in self.attention_backends]
        if new:
            self.attention_backends += new
            self.log.message(f"Attention: {'; '.join(new)}.")
