"""The training loop: batches in, steps out; and what happens between steps."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdx.data.pipeline import Batches
from vdx.parallel import put_batch, replicated
from vdx.train.checkpoint import Checkpoints
from vdx.train.log import Log
from vdx.train.state import TrainState, state_shardings
from vdx.train.step import make_eval_step, make_train_step


class Window:
    """Metrics of the steps since the last log row. They stay on the device until `flush`,
    which runs when a later step has been dispatched, so that reading them stalls nothing."""

    def __init__(self):
        self.steps: list[Any] = []
        self.began, self.waited = time.perf_counter(), 0.0

    def flush(self, clips_per_step: int, waited: float, rate: float) -> dict[str, float]:
        rows = jax.device_get(self.steps)
        elapsed = time.perf_counter() - self.began
        sums = np.sum([r["bin_sums"] for r in rows], 0)
        counts = np.sum([r["bin_counts"] for r in rows], 0)
        edges = np.linspace(0, 1, len(sums) + 1)
        out = {"train/loss": float(np.mean([r["loss"] for r in rows])),
               "train/grad_norm": float(np.mean([r["grad_norm"] for r in rows])),
               "train/learning_rate": rate,
               "speed/clips_per_s": len(rows) * clips_per_step / elapsed,
               "speed/data_wait": (waited - self.waited) / elapsed}
        out |= {f"train/loss_t{a:.1f}-{b:.1f}": float(s / n)
                for a, b, s, n in zip(edges[:-1], edges[1:], sums, counts, strict=True) if n}
        self.steps, self.began, self.waited = [], time.perf_counter(), waited
        return out


class Evaluation:
    """Loss at fixed noise levels on clips that are read once: held-out ones, and seen ones."""

    def __init__(self, experiment, mesh):
        t = experiment.training
        self.levels, self.mesh, self.key = t.levels, mesh, jax.random.key(1234)
        size = min(t.eval_clips, experiment.data.loader["global_batch"])
        self.sets: dict[str, list[Mapping]] = {}
        for name, heldout in (("heldout", True), ("seen", False)):
            # Another seed than training's: other windows of the clips that training sees.
            batches = experiment.batches(heldout=heldout, seed=experiment.seed + 1, workers=0,
                                         global_batch=size)
            self.sets[name] = [put_batch(mesh, next(batches))
                               for _ in range(max(1, t.eval_clips // size))]
            batches.close()
        self.step = jax.jit(make_eval_step(experiment.objective, t.levels),
                            out_shardings=replicated(mesh))

    def __call__(self, params) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, batches in self.sets.items():
            pairs = [self.step(params, batch, self.key) for batch in batches]
            cond, null = (np.concatenate(side, 1) for side in zip(*pairs, strict=True))
            out |= {f"{name}/loss": float(cond.mean()), f"{name}/loss_null": float(null.mean())}
            out |= {f"{name}/loss_t{level:g}": float(loss)
                    for level, loss in zip(self.levels, cond.mean(1), strict=True)}
        return out


@dataclasses.dataclass
class Run:
    """What a finished (or resumed) run leaves in memory."""

    state: TrainState
    seconds: float


def train(experiment, workdir: Path, mesh, on_sample) -> Run:
    """Trains to `config.train.steps`, from the newest checkpoint of the workdir if there is one.

    on_sample(step, ema) draws the wall of samples. Call under `jax.set_mesh(mesh)`.
    """
    t, begin = experiment.training, time.monotonic()
    batches = experiment.batches(workdir=workdir)
    evaluation = Evaluation(experiment, mesh) if t.eval_every else None
    state, shardings, start, checkpoints = start_or_resume(experiment, workdir, mesh, batches)
    step_fn = jax.jit(make_train_step(experiment.objective, experiment.tx, t.ema,
                                      experiment.optimizer.accumulate),
                      donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    rate, clips = experiment.optimizer.rate(t.steps), experiment.data.loader["global_batch"]
    log, window, before = Log(workdir, t.steps, start), Window(), None

    def write(step: int) -> None:
        row = window.flush(clips, batches.wait_seconds, float(rate(step)))
        log.row(step, row)
        log.bar.set_postfix(loss=f"{row['train/loss']:.4f}",
                            clips_s=f"{row['speed/clips_per_s']:.1f}", refresh=False)

    try:
        for step in range(start + 1, t.steps + 1):
            state, metrics = step_fn(state, put_batch(mesh, next(batches)))
            if window.steps and (step - 1) % t.log_every == 0:
                write(step - 1)
            window.steps.append(metrics)
            jax.block_until_ready(before)      # at most two steps in flight, so memory is bounded
            before = metrics["loss"]
            log.bar.update()

            last = step == t.steps
            if evaluation and (step % t.eval_every == 0 or last):
                log.row(step, evaluation(state.ema))
            if t.save_every and (step % t.save_every == 0 or last):
                checkpoints.save(step, state, batches.position)
            if t.sample_every and (step % t.sample_every == 0 or last):
                on_sample(step, state.ema)
        if window.steps:
            write(t.steps)
    finally:
        log.close()
        batches.close()
        checkpoints.close()
    return Run(state, time.monotonic() - begin)


def start_or_resume(experiment, workdir: Path, mesh, batches: Batches):
    """(state, shardings, step, checkpoints): step 0, or exactly where the workdir left off."""
    abstract = jax.eval_shape(experiment.init)
    shardings = state_shardings(mesh, abstract)
    checkpoints = Checkpoints(workdir, experiment.training.keep)
    if checkpoints.latest() is None:
        return jax.jit(experiment.init, out_shardings=shardings)(), shardings, 0, checkpoints
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                        abstract, shardings)
    state, position = checkpoints.restore(like)
    batches.seek(position)
    return state, shardings, int(state.step), checkpoints

