"""The loss at fixed times, on validation clips and on training clips."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from vdx.config.build import ConfigError
from vdx.config.ranges import Count, Fraction, Index
from vdx.diffusion.losses import shared_times
from vdx.evaluation.evaluator import EvaluationContext, Evaluator, Headline, Scores
from vdx.evaluation.html import BLUE, GREEN, ORANGE, LoggedRows, chart, charts, curve, series
from vdx.models.adapters.lora import Adapted
from vdx.parallel import put_batch, replicated
from vdx.train.objectives import Objective
from vdx.train.objectives.denoising import Draws
from vdx.types import Array, Batch, Params, PRNGKeyArray

__all__ = ["LossAtTimes", "LossesAtTimes", "losses_at_times"]

NOISE_SEED = 1234  # the noise of every evaluation, so that two of them differ by the weights alone
SPLITS = {"validation": True, "train_eval": False}  # prefix of the keys -> whether validation
SHADES = ["rgb(59,125,216)", "rgb(176,88,178)", "rgb(226,128,52)"]  # of times, low to high


class LossesAtTimes(NamedTuple):
    """The losses of a batch, [times b]."""

    conditioned: Array
    null: Array  # with every signal dropped


@dataclasses.dataclass(frozen=True)
class LossAtTimes(Evaluator):
    """Loss at fixed times on clips that are read once, with and without conditioning.

    Scores: `validation/loss`, `validation/loss_null` (every signal dropped) and
    `validation/loss_t0.1` for each time; the same for training clips under `train_eval/`.
    """

    every: Index = 500  # steps between evaluations; 0: only at the end
    clips: Count = 64  # of each split, in batches of at most the training batch
    times: tuple[Fraction, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # 0 is data and 1 is noise

    title: ClassVar[str] = "Loss"
    about: ClassVar[str] = (
        "Where captions help, the loss with captions dropped is the higher one. The curve of "
        "training clips is measured as that of validation clips is. t = 0 is data and t = 1 is "
        "noise."
    )

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range, or no times."""
        super().__post_init__()
        if not self.times:
            raise ConfigError("config.eval.loss.times is empty: give one or more times in [0, 1].")

    def prepare(self, context: EvaluationContext) -> Callable[[Params], Scores]:
        """Read the clips of both splits; see Evaluator."""
        step = jax.jit(
            functools.partial(losses_at_times, context.experiment.objective, self.times),
            out_shardings=replicated(context.mesh),
        )
        batches = {
            split: self._read_batches(context, validation) for split, validation in SPLITS.items()
        }
        return functools.partial(self._run, step, batches)

    def _read_batches(self, context: EvaluationContext, validation: bool) -> list[Batch]:
        experiment = context.experiment
        size = min(self.clips, experiment.loader.global_batch)
        # Another seed than training's: other windows of the clips that training sees.
        batches = experiment.batches(
            validation=validation,
            seed=experiment.seed + 1,
            workers=0,
            global_batch=size,
            buckets=(),
        )
        count = max(1, self.clips // size)
        found = [put_batch(context.mesh, next(batches)) for _ in range(count)]
        batches.close()
        return found

    def _run(
        self,
        step: Callable[..., LossesAtTimes],
        batches: Mapping[str, Sequence[Batch]],
        params: Params,
    ) -> Scores:
        scores: dict[str, float] = {}
        key = jax.random.key(NOISE_SEED)
        for split, chosen in batches.items():
            results = [step(params, batch, key) for batch in chosen]
            conditioned = np.concatenate([result.conditioned for result in results], axis=1)
            null = np.concatenate([result.null for result in results], axis=1)

            scores[f"{split}/loss"] = float(conditioned.mean())
            scores[f"{split}/loss_null"] = float(null.mean())
            for time, loss in zip(self.times, conditioned.mean(axis=1), strict=True):
                scores[f"{split}/loss_t{time:g}"] = float(loss)
        return scores

    def logged(self, scores: Scores) -> dict[str, float]:
        """Return all of the scores; see Evaluator."""
        return dict(scores)

    def text(self, scores: Scores) -> str:
        """Format a line for each split; see Evaluator."""
        keys = ["loss", "loss_null", *(f"loss_t{time:g}" for time in self.times)]
        lines = [f"{'loss':12}" + "".join(f"{key:>11}" for key in keys)]
        for split in SPLITS:
            numbers = "".join(f"{scores[f'{split}/{key}']:11.4g}" for key in keys)
            lines.append(f"{split:12}{numbers}")
        return "\n".join(lines)

    def section(self, scores: Scores, workdir: Path, logged: LoggedRows) -> str:
        """Draw the curves of metrics.jsonl; see Evaluator."""
        traces = _loss_curves(logged)
        by_time = _curves_by_time(logged)
        if not traces and not any(by_time):
            return ""
        return charts(chart("", traces, "loss", log=True, height=430)) + charts(*by_time)

    def headline(self, scores: Scores, logged: LoggedRows) -> Headline:
        """Return the newest validation loss; see Evaluator."""
        latest = {
            key: format(list(found.values())[-1], ".4g")
            for key in ("validation/loss", "validation/loss_null")
            if (found := series(logged, key))
        }
        note = f"{latest.get('validation/loss_null', '–')} without captions"
        return Headline("validation loss", latest.get("validation/loss", ""), note)


def losses_at_times(
    objective: Objective,
    times: tuple[Fraction, ...],
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


def _loss_curves(logged: LoggedRows) -> list[Any]:
    raw = curve(logged, "train/loss", "training", BLUE, width=1)
    for trace in raw:
        trace.update(opacity=0.3, showlegend=False)
    traces = raw + curve(logged, "train/loss", "training", BLUE, smooth=True)

    for split, name, colour in (
        ("train_eval", "training clips", GREEN),
        ("validation", "validation", ORANGE),
    ):
        traces += curve(logged, f"{split}/loss", name, colour)
        traces += curve(
            logged, f"{split}/loss_null", f"{name}, captions dropped", colour, dash="dot"
        )
    return traces


def _curves_by_time(logged: LoggedRows) -> list[str]:
    """Charts of the loss by time: training, validation, and the latest evaluation."""
    found = []
    latest = []
    for split, name, colour in (
        ("train", "training", BLUE),
        ("validation", "validation", ORANGE),
        ("train_eval", "training clips", GREEN),
    ):
        prefix = f"{split}/loss_t"
        pattern = re.compile(prefix + r"[\d.-]+")
        keys = sorted({key for row in logged.values() for key in row if pattern.fullmatch(key)})
        shades = sample_colorscale(SHADES, np.linspace(0, 1, max(len(keys), 2)).tolist())

        # One curve for each time.
        traces = []
        for key, shade in zip(keys, shades, strict=False):
            label = key.replace(prefix, "t = ").replace("-", "–")
            traces += curve(logged, key, label, shade, smooth=split == "train")

        if split != "train_eval":
            found.append(chart(f"By time, {name}", traces, "loss", log=True))

        # The last point of each curve. The times of training are intervals, so it has none.
        if split != "train" and traces:
            line = go.Scatter(
                x=[key.removeprefix(prefix) for key in keys],
                y=[trace.y[-1] for trace in traces],
                name=name,
                mode="lines+markers",
                line={"color": colour},
            )
            latest.append(line)
    found.append(chart("Latest evaluation", latest, "loss", "time t", log=True))
    return found
