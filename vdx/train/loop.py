"""The training loop: batches in, steps out; what happens between steps, and when a step is bad."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vdx.data.workers import dump_workers, kill_workers
from vdx.files import append_rows, host_file, write_json
from vdx.models.attention.backends import selected_backends
from vdx.models.conditioning.text_signals import NULL
from vdx.models.remat import check_remat
from vdx.parallel import put_batch, replicated
from vdx.train.checkpoint import CheckpointError, Checkpoints, check_base, locate
from vdx.train.checksum import whole_digest
from vdx.train.compile import StepCompiler, peak_flops
from vdx.train.log import Log
from vdx.train.preemption import Preempted, PreemptionHandler, Watchdog, exit_if_peer_lost
from vdx.train.program import train_program
from vdx.train.state import TrainState
from vdx.train.step import make_eval_step


class BadNumbers(ValueError):
    """Batch after batch was refused, also after going back; the message names the batches."""


class MetricsAccumulator:
    """Metrics of the steps since the last log row; they travel with the checkpoints, so that a
    resumed run logs the same losses."""

    def __init__(self, rows: list[dict] | None = None):
        self.rows = rows or []
        self.done, self.began, self.waited = np.zeros(3), time.perf_counter(), 0.0

    def add(self, row: Mapping[str, Any], work: tuple[int, int, float]) -> None:
        self.rows.append({k: np.asarray(v).tolist() for k, v in row.items()})
        self.done += work

    def flush(self, waited: float, rate: float, peak: float) -> dict[str, float]:
        """peak: operations a second at best; 0: not known."""
        elapsed = time.perf_counter() - self.began
        clips, tokens, flops = (float(n) / elapsed for n in self.done)
        out = {
            "train/learning_rate": rate,
            "speed/clips_per_s": clips,
            "speed/tokens_per_s": tokens,
            "speed/data_wait": (waited - self.waited) / elapsed,
        }
        if peak:
            out["speed/mfu"] = flops / peak
        if most := (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
            out["speed/peak_memory_gib"] = most / 2**30
        if rows := [r for r in self.rows if r["ok"]]:  # the rest may hold NaN
            sums, counts = (np.sum([r[k] for r in rows], 0) for k in ("bin_sums", "bin_counts"))
            edges = np.linspace(0, 1, len(sums) + 1)
            out |= {
                f"train/{k}": float(np.mean([r[k] for r in rows])) for k in ("loss", "grad_norm")
            }
            out |= {
                f"train/loss_t{a:.1f}-{b:.1f}": float(s / n)
                for a, b, s, n in zip(edges[:-1], edges[1:], sums, counts, strict=True)
                if n
            }
        self.rows, self.done = [], np.zeros(3)
        self.began, self.waited = time.perf_counter(), waited
        return out


class Evaluation:
    """Loss at fixed noise levels on clips that are read once: held-out ones, and seen ones."""

    def __init__(self, experiment, mesh):
        t = experiment.training
        self.levels, self.mesh, self.key = t.eval_times, mesh, jax.random.key(1234)
        size = min(t.eval_clips, experiment.data.loader["global_batch"])
        self.sets: dict[str, list[Mapping]] = {}
        for name, validation in (("validation", True), ("train_eval", False)):
            # Another seed than training's: other windows of the clips that training sees.
            batches = experiment.batches(
                validation=validation,
                seed=experiment.seed + 1,
                workers=0,
                global_batch=size,
                buckets=(),
            )
            self.sets[name] = [
                put_batch(mesh, next(batches)) for _ in range(max(1, t.eval_clips // size))
            ]
            batches.close()
        self.step = jax.jit(
            make_eval_step(experiment.objective, t.eval_times), out_shardings=replicated(mesh)
        )

    def __call__(self, params) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, batches in self.sets.items():
            pairs = [self.step(params, batch, self.key) for batch in batches]
            cond, null = (np.concatenate(side, 1) for side in zip(*pairs, strict=True))
            out |= {f"{name}/loss": float(cond.mean()), f"{name}/loss_null": float(null.mean())}
            out |= {
                f"{name}/loss_t{level:g}": float(loss)
                for level, loss in zip(self.levels, cond.mean(1), strict=True)
            }
        return out


@dataclasses.dataclass
class Run:
    """What a finished (or resumed) run leaves in memory. params: averaged, to draw with."""

    state: TrainState
    params: Any
    seconds: float


@dataclasses.dataclass
class PendingStep:
    """A step that has been dispatched and whose numbers have not been looked at."""

    step: int
    position: int
    keys: list[str]
    metrics: Mapping[str, Any]
    work: tuple[int, int, float] = (0, 0, 0.0)


def train(
    experiment, workdir: Path, mesh, on_sample: Callable[[int, Any], None], stop: PreemptionHandler
) -> Run:
    """Trains to `config.train.steps`, from the newest checkpoint of the workdir if there is one.

    on_sample(step, params) draws the wall of samples with the averaged parameters. Call under
    `jax.set_mesh(mesh)`. Raises Preempted when `stop` was requested and the state is saved,
    BadNumbers when going back to a checkpoint does not help, CheckpointError, DataError.
    """
    t, begin = experiment.training, time.monotonic()
    batches = experiment.batches(workdir=workdir)
    try:
        with (
            Checkpoints(workdir, t.max_to_keep, t.keep_period, t.best_metric) as checkpoints,
            Watchdog(
                t.watchdog_seconds, (dump_workers, kill_workers, checkpoints.wait)
            ) as watchdog,
            exit_if_peer_lost(kill_workers),
        ):
            trainer = Trainer(experiment, workdir, mesh, batches, checkpoints, watchdog)
            if jax.process_index() == 0:  # not before: what is there may not fit this config
                write_json(workdir / "config.json", experiment.config)
            try:
                state = trainer.run(on_sample, stop)
            finally:
                stop.end_polling()
                trainer.programs.close()
                trainer.log.close()
    finally:
        batches.close()
    return Run(state, trainer.averaged(), time.monotonic() - begin)


class Trainer:
    """The moving parts of a run: state, data, checkpoints, log, and the streak of bad steps."""

    def __init__(
        self, experiment, workdir: Path, mesh, batches, checkpoints: Checkpoints, watchdog: Watchdog
    ):
        self.experiment, self.t = experiment, experiment.training
        check_remat(experiment.model.backbone.remat, jax.local_devices()[0])
        self.workdir, self.mesh, self.batches = workdir, mesh, batches
        self.checkpoints, self.watchdog = checkpoints, watchdog
        self.evaluation = Evaluation(experiment, mesh) if self.t.eval_every else None
        # All of them now: asked for later, one would be computed behind the step in flight.
        self.rates = np.asarray(
            jax.vmap(experiment.optimizer.rate(self.t.steps))(np.arange(self.t.steps + 1))
        )
        self.peak = peak_flops(mesh)
        step, self.abstract_state = train_program(experiment, mesh)
        self.bad: list[PendingStep] = []  # the steps in a row that were refused
        self.rollbacks = 0
        self.flying: PendingStep | None = None
        self.window = MetricsAccumulator()
        # The weights beside what is trained, and their digest, which every checkpoint keeps.
        self.frozen = self.base = self.given = None
        if experiment.part is not None:
            self.frozen, self.given = experiment.read_frozen(mesh)
            self.base = whole_digest(self.frozen)
            self.frozen = experiment.with_null(self.frozen)
            null = flatten_dict(self.frozen, sep="/").get(NULL)
            if null is not None and jax.process_index() == 0:
                np.save(workdir / "null.npy", np.asarray(null, np.float32))
        self.programs = StepCompiler(
            step, self.abstract_state, self.frozen, experiment, mesh, batches.samples
        )
        self.state, origin = self.start()
        self.given = None
        self.step = int(self.state.step)
        self.log = Log(workdir, self.t.steps, self.step)
        self.log.say(origin)

    # Where a run begins

    def start(self) -> tuple[TrainState, str]:
        """(state, where it is from): of the workdir's own checkpoints, else of `config.resume`,
        else at step 0."""
        resume = self.experiment.resume
        if mine := self.checkpoints.restore(self.abstract_state):
            return self.resume_from(
                *mine
            ), f"Goes on from step {int(mine[0].step)} of {self.workdir}."
        if resume:
            path, step = locate(resume)
            with Checkpoints(path, read_only=True) as other:
                found = other.restore(self.abstract_state, step)
            if found is None:
                raise CheckpointError(f"config.resume = {resume!r}: {path} has no checkpoint.")
            return self.resume_from(*found), f"Goes on from step {int(found[0].step)} of {resume}."
        return self.fresh()

    def fresh(self) -> tuple[TrainState, str]:
        """(state at step 0, where its weights are from): of `config.init`, else of
        `config.weights`, else new; with frozen weights these are those beside them."""
        experiment, params, origin = self.experiment, None, "new weights"
        if experiment.part is not None:
            params = self.given or experiment.read_frozen(self.mesh)[1]
            origin = (
                "new adapters" if experiment.lora else experiment.describe_initialisation(params)
            )
            origin += f" beside the weights of {experiment.weights}"
        if experiment.init_from:
            path, step = locate(experiment.init_from)
            with Checkpoints(path, read_only=True) as other:
                params, step, _ = other.restore_params(self.abstract_state.params, step=step)
            origin = f"the averaged weights of {experiment.init_from}, step {step}"
        elif experiment.weights and experiment.part is None:
            params = experiment.with_null(experiment.read_weights(self.mesh))
            origin = f"the weights of {experiment.weights}"
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        made = jax.jit(experiment.init, out_shardings=shardings, donate_argnums=0)(params)
        return made, f"Starts with {origin}."

    def averaged(self) -> Any:
        """The averaged parameters that the network runs with."""
        return self.experiment.objective.whole(self.state.ema, self.frozen)

    def resume_from(self, state: TrainState, progress: Mapping[str, Any]) -> TrainState:
        check_base(progress, self.base, f"step {int(state.step)}")
        self.batches.seek(progress["position"])
        self.window = MetricsAccumulator(progress["window"])
        self.bad = [PendingStep(**b, metrics={}) for b in progress["bad"]]
        self.rollbacks = progress["rollbacks"]
        return state

    # Steps

    def run(self, on_sample, stop: PreemptionHandler) -> TrainState:
        t, said = self.t, selected_backends()
        stop.polled = True
        while self.step < t.steps:
            self.take_step()
            if new := [line for line in selected_backends() if line not in said]:
                said += new
                self.log.say(f"Attention: {'; '.join(new)}.")
            stopping = stop.requested()
            pause = (
                stopping
                or self.step == t.steps
                or self.due(t.eval_every, t.save_every, t.sample_every)
            )
            if pause and len(self.bad) < t.max_bad_steps:
                self.collect_pending()
            if len(self.bad) >= t.max_bad_steps:
                self.roll_back()
                continue
            scores = None
            if self.evaluation and self.due(t.eval_every):
                scores = self.evaluation(self.averaged())
                self.log.row(self.step, scores)
            if self.due(t.save_every) or stopping:
                self.save(scores)
            if stopping:
                self.log.say(f"Stopped at step {self.step}; the same command goes on from there.")
                self.checkpoints.wait()
                raise Preempted
            if self.due(t.sample_every):
                on_sample(self.step, self.averaged())
            self.watchdog.beat()
        if self.window.rows:
            self.write(self.step)
        return self.state

    def due(self, *every: int) -> bool:
        """Whether this is the last step, or a multiple of one of `every`; 0 is never."""
        last = self.step == self.t.steps
        return any(n and (last or self.step % n == 0) for n in every)

    def take_step(self) -> None:
        """Dispatches a step, then looks at the one before while this one runs: so the device
        never waits, and at most two steps are in flight."""
        batch = put_batch(self.mesh, next(self.batches))
        step, work = self.programs(batch)
        self.state, metrics = step(self.state, batch, self.frozen)
        self.step += 1
        self.collect_pending()
        self.flying = PendingStep(
            self.step, self.batches.position - 1, list(self.batches.last_keys), metrics, work
        )
        self.log.bar.update()

    def collect_pending(self) -> None:
        """Takes note of the step in flight."""
        if self.flying is None:
            return
        done, self.flying = self.flying, None
        row = jax.device_get(done.metrics)
        self.window.add(row, done.work)
        if row["ok"]:
            self.bad = []
        else:
            self.bad.append(done)
            self.refused(done, row)
        if done.step % self.t.log_every == 0:
            self.write(done.step)

    def write(self, step: int) -> None:
        accepted = self.window.rows[-1]["accepted"]
        row = self.window.flush(self.batches.wait_seconds, float(self.rates[accepted]), self.peak)
        self.log.row(step, {**row, "train/refused": step - accepted})
        shown = {
            name: row[key]
            for name, key in (
                ("clips_s", "speed/clips_per_s"),
                ("mfu", "speed/mfu"),
                ("loss", "train/loss"),
            )
            if key in row
        }
        self.log.bar.set_postfix(refresh=False, **{k: f"{v:.4g}" for k, v in shown.items()})

    def save(self, scores: Mapping[str, float] | None) -> None:
        if self.checkpoints.latest() == self.step:
            return
        self.checkpoints.save(
            self.step,
            self.state,
            {
                "position": self.batches.position,
                "window": self.window.rows,
                "bad": [{"step": b.step, "position": b.position, "keys": b.keys} for b in self.bad],
                "rollbacks": self.rollbacks,
                **({"weights": self.base} if self.base else {}),
            },
            scores,
        )

    # Bad numbers

    def refused(self, done: PendingStep, row: Mapping[str, Any]) -> None:
        """Names a refused batch in the log; every process those of its own records."""
        host = jax.process_index()
        path = host_file(self.workdir / "refused_batches.jsonl", host)
        append_rows(
            path,
            [
                {
                    "step": done.step,
                    "position": done.position,
                    "host": host,
                    "loss": str(row["loss"]),
                    "grad_norm": str(row["grad_norm"]),
                    "keys": done.keys,
                }
            ],
        )
        self.log.say(
            f"Step {done.step} refused: loss {row['loss']:.4g}, gradient norm "
            f"{row['grad_norm']:.4g}. See {path}"
        )

    def roll_back(self) -> None:
        """To the newest step before the streak of refused ones; the data moves on."""
        first, t = self.bad[0].step, self.t
        if self.rollbacks >= t.max_rollbacks:
            names = "".join(
                f"\n  step {b.step}, batch {b.position}: {', '.join(b.keys)}" for b in self.bad
            )
            raise BadNumbers(
                f"{len(self.bad)} batches in a row gave a loss or a gradient that is not finite, "
                f"or spikes, after going back {self.rollbacks} times. Look at these records, or "
                "lower the learning rate; config.train.max_grad_norm_ratio, bad_in_row and rollbacks set the "
                f"limits. refused_batches.jsonl has the numbers:{names}"
            )
        position, rollbacks = self.batches.position, self.rollbacks + 1
        found = self.checkpoints.restore(self.abstract_state, before=first)
        self.state = found[0] if found else self.fresh()[0]
        self.step = int(self.state.step)
        self.checkpoints.delete_after(self.step)
        self.batches.seek(position)
        self.bad, self.flying, self.window, self.rollbacks = (
            [],
            None,
            MetricsAccumulator(),
            rollbacks,
        )
        self.log.say(
            f"{t.max_bad_steps} refused in a row: back to step {self.step}, with new data."
        )
        self.log.bar.n = self.step
        self.log.bar.refresh()
