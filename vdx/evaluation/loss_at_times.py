"""The loss at fixed diffusion times, on validation clips and on training clips.

Clips and noise are the same at every call, so that two results differ by the weights alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdx.diffusion.losses import shared_times
from vdx.experiment import Experiment
from vdx.models.adapters.lora import Adapted
from vdx.parallel import put_batch, replicated
from vdx.train.objectives import Objective
from vdx.train.objectives.denoising import Draws
from vdx.types import Array, Batch, Params, PRNGKeyArray

__all__ = ["LossAtTimes", "LossesAtTimes", "losses_at_times"]

NOISE_SEED = 1234  # of the noise, in every evaluation of every run


class LossesAtTimes(NamedTuple):
    """The losses of a batch, [times b]."""

    conditioned: Array
    null: Array  # with every signal dropped


class LossAtTimes:
    """The loss at `config.train.eval_times`; call it with the averaged parameters."""

    def __init__(self, experiment: Experiment, mesh: Mesh):
        self.times = experiment.training.eval_times
        self.key = jax.random.key(NOISE_SEED)
        self.batches = {
            "validation": read_clips(experiment, mesh, validation=True),
            "train_eval": read_clips(experiment, mesh, validation=False),
        }
        self.step = jax.jit(
            functools.partial(losses_at_times, experiment.objective, self.times),
            out_shardings=replicated(mesh),
        )

    def __call__(self, params: Params | Adapted) -> dict[str, float]:
        """Return `{set}/loss`, `/loss_null` and `/loss_t{time}` of both sets of clips."""
        scores: dict[str, float] = {}
        for name, batches in self.batches.items():
            results = [self.step(params, batch, self.key) for batch in batches]
            conditioned = np.concatenate([result.conditioned for result in results], axis=1)
            null = np.concatenate([result.null for result in results], axis=1)

            scores[f"{name}/loss"] = float(conditioned.mean())
            scores[f"{name}/loss_null"] = float(null.mean())
            for time, loss in zip(self.times, conditioned.mean(axis=1), strict=True):
                scores[f"{name}/loss_t{time:g}"] = float(loss)
        return scores


def read_clips(experiment: Experiment, mesh: Mesh, *, validation: bool) -> list[Batch]:
    """Read `config.train.eval_clips` clips, in batches of at most the training batch."""
    count = experiment.training.eval_clips
    size = min(count, experiment.loader.global_batch)
    # Another seed than training's: other windows of the clips that training sees.
    batches = experiment.batches(
        validation=validation,
        seed=experiment.seed + 1,
        workers=0,
        global_batch=size,
        buckets=(),
    )
    clips = [put_batch(mesh, next(batches)) for _ in range(max(1, count // size))]
    batches.close()
    return clips


def losses_at_times(
    objective: Objective,
    times: tuple[float, ...],
    params: Params | Adapted,
    batch: Batch,
    key: PRNGKeyArray,
) -> LossesAtTimes:
    """Return every clip's loss at every time, with conditioning and without."""
    x0 = objective.clean(batch)  # b t h w c
    batch = objective.with_clip_signals(batch, x0, key)
    clips, frames = x0.shape[:2]

    def at(time_and_key: tuple[Array, PRNGKeyArray]) -> LossesAtTimes:
        # Every time has noise of its own, the same with conditioning and without.
        time, noise_key = time_and_key
        noise = jax.random.normal(noise_key, x0.shape)
        frame_times = shared_times(jnp.full(clips, time), frames)

        def losses(dropped: bool) -> Array:
            drop = objective.model.drop_masks(clips, dropped)
            draws = Draws(frame_times, noise, drop)
            return objective.weighted_sum(objective.term_losses(params, batch, x0, draws))

        return LossesAtTimes(losses(dropped=False), losses(dropped=True))

    # One time after another: all at once would need the memory of several batches.
    return jax.lax.map(at, (jnp.asarray(times), jax.random.split(key, len(times))))
