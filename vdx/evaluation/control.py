"""Control: clips drawn with a signal and without it, and how well they follow it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from vdx.config.ranges import Count
from vdx.data.scenes.source import Scenes
from vdx.data.scenes.world import VELOCITIES
from vdx.data.signals import SIGNALS, Clip, read_signals
from vdx.evaluation.drawing import FIRST_SEED, ClipDrawer
from vdx.evaluation.evaluator import EvaluationContext, Evaluator, Scores
from vdx.evaluation.html import LoggedRows, format_number, table, verdict
from vdx.evaluation.scene_truth import scene_truth
from vdx.experiment import Experiment
from vdx.metrics.control import CONTROL_METRICS, control_scores
from vdx.models.conditioning.control_signals import KnownFrames
from vdx.types import Params

__all__ = ["Control"]

WITHOUT_TEXT = ("reference", "flow", "camera")  # the text would give the same away
Truth = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Control(Evaluator):
    """How well drawn clips follow each control signal of the model.

    Scores: `clips`, and `signals`, a list with one entry for each measure: the fields of
    `control_scores`, and `without`, the value of clips drawn without the signal.
    """

    clips: Count = 64  # drawn for each signal, and once without

    title: ClassVar[str] = "Control"
    about: ClassVar[str] = (
        "One line for each measure of a control signal. Without: clips drawn without the signal. "
        "Shuffled: the drawn clips, scored against the signals of other clips."
    )
    needs: ClassVar[tuple[str, ...]] = ("truth", "clips")

    def prepare(self, context: EvaluationContext) -> Callable[[Params], Scores]:
        """See Evaluator."""
        return functools.partial(self._run, context)

    def _run(self, context: EvaluationContext, params: Params) -> Scores:
        experiment = context.experiment
        source = experiment.source(validation=True)
        assert isinstance(source, Scenes)
        rows = _score_signals(
            ControlledScenes(experiment, context.drawing, source, self.clips, params)
        )

        # The frame rate is measured on objects that move in one direction.
        rates = experiment.clip.rates if experiment.clip else ()
        if "fps" in experiment.model.signals and len(set(rates)) > 1:
            directions = tuple(motion for motion in source.motions if motion in VELOCITIES)
            moving = dataclasses.replace(source, motions=directions)
            scenes = ControlledScenes(experiment, context.drawing, moving, self.clips, params)
            rows.append(_score_frame_rate(scenes, min(rates), max(rates)))
        return {"clips": self.clips, "signals": rows}

    def logged(self, scores: Scores) -> dict[str, float]:
        """Return the model's value of each measure; see Evaluator."""
        return {
            f"control/{row['signal']}/{row['measure'].replace(' ', '_')}": row["model"]
            for row in scores["signals"]
        }

    def text(self, scores: Scores) -> str:
        """Format a line for each measure; see Evaluator."""
        lines = [
            f"{'signal':14}{'measure':34}{'unit':10}{'model':>9}{'without':>9}{'shuffled':>9}"
            f"{'true':>9}{'goal':>9}"
        ]
        for row in scores["signals"]:
            numbers = "".join(f"{format_number(row[key]):>9}" for key in NUMBERS)
            reached = "reached" if row["reached"] else "not reached"
            lines.append(
                f"{row['signal']:14}{row['measure']:34}{row['unit']:10}{numbers}  {reached}"
            )
        lines.append(
            "without: the signal; shuffled: against other clips' signals; true: the reader on "
            "true renders"
        )
        return "\n".join(lines)

    def section(self, scores: Scores, workdir: Path, logged: LoggedRows) -> str:
        """Show a line for each measure; see Evaluator."""
        rows = scores.get("signals")
        if not rows:
            return ""
        lines = []
        for row in rows:
            names = [escape(str(row.get(key, ""))) for key in ("signal", "measure", "unit")]
            numbers = [format_number(row.get(key)) for key in NUMBERS]
            lines.append([*names, *numbers, verdict(row.get("reached"))])
        head = ["signal", "measure", "unit", *NUMBERS.values(), ""]
        return table(head, lines, "values")


# Key of a row -> heading in the report.
NUMBERS = {
    "model": "model",
    "without": "without the signal",
    "shuffled": "shuffled signals",
    "true": "reader on true renders",
    "goal": "goal",
}


@dataclasses.dataclass(frozen=True)
class ControlledScenes:
    """Validation scenes, what their clips should show, and clips drawn for them."""

    experiment: Experiment
    drawing: ClipDrawer
    source: Scenes
    count: int
    params: Params

    @functools.cached_property
    def truths(self) -> list[Truth]:
        """True clips and states at the usual rate."""
        return self.truths_at(self.drawing.fps)

    def truths_at(self, fps: float) -> list[Truth]:
        """Return true clips and states at `fps` frames per second."""
        times = np.arange(self.drawing.num_frames) / fps
        size = (self.experiment.data.height, self.experiment.data.width)
        return [scene_truth(self.source.scene(i), times, *size) for i in range(self.count)]

    def draw(
        self,
        controls: Mapping[str, np.ndarray] | None = None,
        *,
        fps: float | None = None,
        with_text: bool = True,
    ) -> np.ndarray:
        """Draw uint8 [n t h w 3], one clip a scene."""
        prompts = [""] * self.count
        if with_text:
            prompts = [self.source[i].caption for i in range(self.count)]
        return self.drawing.draw(self.params, prompts, fps=fps, controls=controls)

    @functools.cached_property
    def plain(self) -> np.ndarray:
        """Clips drawn from the text alone."""
        return self.draw()

    @functools.cached_property
    def unconditional(self) -> np.ndarray:
        """Clips drawn without text and without a signal."""
        return self.draw(with_text=False)

    def signal(self, name: str) -> dict[str, np.ndarray]:
        """Read the entries of the batch for a signal, as the scenes have it."""
        rng = np.random.default_rng(FIRST_SEED)
        points = self.experiment.clip.flow_points if self.experiment.clip else 0
        size = (self.experiment.data.height, self.experiment.data.width)
        rows = []
        for i in range(self.count):
            record = self.source[i]
            times = self.drawing.times
            clip = Clip(record, times, self.drawing.fps, record.read(times), size, points, rng)
            rows.append(read_signals((name,), clip)[name])
        return {name: np.stack(rows)}


def _score_signals(scenes: ControlledScenes) -> list[dict[str, Any]]:
    """Score every signal that the model reads, apart from the frame rate."""
    signals = set(scenes.experiment.model.signals)
    rows = []
    if "known_frames" in signals:
        rows += _score_known_frames(scenes)
    if "motion" in signals:
        rows += _score_motion(scenes)

    measured = {metric.signal for metric in CONTROL_METRICS.values()}
    for name in sorted(signals & measured & set(SIGNALS) - {"motion"}):
        with_text = name not in WITHOUT_TEXT
        without = scenes.plain if with_text else scenes.unconditional
        videos = scenes.draw(scenes.signal(name), with_text=with_text)
        rows += _score_clips(scenes, name, videos, without, scenes.truths)
    return rows


def _score_clips(
    scenes: ControlledScenes,
    signal: str,
    videos: np.ndarray,
    without: np.ndarray,
    truths: Sequence[Truth],
) -> list[dict[str, Any]]:
    """Score clips by each measure of a signal, next to clips drawn without it."""
    fps = scenes.drawing.fps
    rows = []
    for kind, metric in CONTROL_METRICS.items():
        if metric.signal == signal:
            row = control_scores(kind, list(videos), truths, fps)
            plain = control_scores(kind, list(without), truths, fps)
            rows.append({**row, "without": plain["model"]})
    return rows


def _score_known_frames(scenes: ControlledScenes) -> list[dict[str, Any]]:
    """Score clips drawn with their true first frame, and with first and last frame."""
    places = {"first_frame": [0], "last_frame": [0, -1]}
    settings = scenes.experiment.model.signals["known_frames"]
    if not settings.get("last", KnownFrames.last):
        del places["last_frame"]

    pixels = np.stack([truth["video"] for truth in scenes.truths])
    x0 = np.asarray(scenes.experiment.objective.clean({"video": jnp.asarray(pixels)}))
    rows = []
    for name, frames in places.items():
        mask = np.zeros(pixels.shape[:2], np.float32)  # b t
        mask[:, frames] = 1.0
        known = x0 * mask[..., None, None, None]
        videos = scenes.draw({"known": known, "known_mask": mask})
        rows += _score_clips(scenes, name, videos, scenes.plain, scenes.truths)
    return rows


def _score_motion(scenes: ControlledScenes) -> list[dict[str, Any]]:
    """Score clips drawn with the motion scores of other scenes, with their own text."""
    usual = sorted(truth["motion"] for truth in scenes.truths)
    wanted = np.random.default_rng(FIRST_SEED).permutation(usual)
    truths = [
        {**truth, "motion": value} for truth, value in zip(scenes.truths, wanted, strict=True)
    ]
    videos = scenes.draw({"motion": wanted.astype(np.float32)})
    return _score_clips(scenes, "motion", videos, scenes.plain, truths)


def _score_frame_rate(scenes: ControlledScenes, low: float, high: float) -> dict[str, Any]:
    """Score clips drawn at two rates from the same words and noise."""
    videos = []
    truths = []
    clips = [scenes.draw(fps=rate) for rate in (low, high)]
    true = [scenes.truths_at(rate) for rate in (low, high)]
    for i in range(scenes.count):
        videos += [clips[0][i], clips[1][i]]
        truths += [true[0][i], true[1][i]]
    row = control_scores("fps", videos, truths, [low, high] * scenes.count)
    # A model that ignores the rate shows the same displacement in each frame.
    return {**row, "without": math.log2(high / low)}
