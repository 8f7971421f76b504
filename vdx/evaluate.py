"""Judge: python -m vdx.evaluate --workdir=runs/tiny

Prompt following: clips are drawn for held-out prompts, whose combinations of attributes never
occurred in training, and read back from pixels. Steering: for each signal that the model reads,
clips are drawn with it and without, and what it asks for is measured. Writes `eval.json`,
`eval/*.mp4`, the first twelve of them as one picture `eval/sample_grid.webp`, and the report.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from vdx.compilation_cache import enable_compilation_cache
from vdx.config.build import ConfigError
from vdx.data.scenes.source import Scenes
from vdx.data.scenes.world import VELOCITIES
from vdx.data.signals import SIGNALS, Clip, read_signals
from vdx.data.sources import SOURCES
from vdx.evaluation.report import write_report
from vdx.experiment import Experiment, load, open_params
from vdx.files import write_json
from vdx.generate.sample_grid import write_clips, write_sheet
from vdx.generate.video_io import to_uint8
from vdx.metrics.control import CONTROL_METRICS, control_scores, scene_truth
from vdx.metrics.prompt_following import ATTRIBUTES, score
from vdx.models.conditioning.control_signals import KnownFrames
from vdx.types import Params

FLAGS = flags.FLAGS
WORDLESS = ("reference", "flow", "camera")  # drawn with no words, which tell the same
SEED = 10_000  # of the first judged clip; training's wall uses 0, 1, ...


def evaluate_run(experiment: Experiment, params: Params, workdir: Path, step: int) -> dict:
    """Judges as `config.eval` says; returns what `eval.json` says."""
    # Asked before it is made: a stranger's config could point it at any folder.
    if SOURCES.get(str(experiment.data.source.get("name"))) is not Scenes:
        raise ConfigError(
            "Judging needs data whose truth is known (source 'scenes'). Set "
            "config.eval.prompts = 0 and steering = 0 for other data."
        )
    result: dict = {"step": step}
    if experiment.eval.prompts:
        result |= prompt_following(experiment, params, workdir)
    if experiment.eval.steering:
        result["steering"] = steering(experiment, params)
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", result)
    return result


def prompt_following(experiment: Experiment, params: Params, workdir: Path) -> dict:
    """Scores `config.eval.prompts` held-out prompts."""
    source = experiment.source(validation=True)
    count, (frames, fps) = experiment.eval.prompts, experiment.clip_default()
    records = [source[i] for i in range(count)]
    prompts = [r.caption for r in records]
    vocabulary = {"colours": source.colours, "shapes": source.shapes, "motions": source.motions}
    seeds = [SEED + i for i in range(count)]
    videos = to_uint8(experiment.generator()(params, prompts, seeds, num_frames=frames, fps=fps))
    truth = [{k: r.attributes[k] for k in ATTRIBUTES} for r in records]
    times = np.arange(frames) / fps
    drawn = score(videos, truth, fps, **vocabulary)
    true = score([r.read(times) for r in records], truth, fps, **vocabulary)
    rows = [
        {"prompt": p, "seed": s, "truth": t, "read": r, "ok": t == r}
        for p, s, t, r in zip(prompts, seeds, truth, drawn["readings"], strict=True)
    ]
    sampling = experiment.sampling
    result = {
        "prompts": count,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "scores": drawn["accuracy"],
        "chance": drawn["chance"],
        "true_renders": true["accuracy"],
        "confusion": confusion(truth, drawn["readings"]),
    }
    if jax.process_index() == 0:
        rows = write_clips(workdir / "eval", videos, fps, rows)
        write_sheet(workdir / "eval" / "sample_grid.webp", videos[:12], prompts[:12], fps)
        result["examples"] = [{**row, "file": f"eval/{row['file']}"} for row in rows]
    return result


class Drawing:
    """Held-out scenes, what their clips should show, and clips drawn for them."""

    def __init__(self, experiment: Experiment, params: Params, source: Scenes, count: int):
        self.experiment, self.params = experiment, params
        self.frames, self.fps = experiment.clip_default()
        self.generator, self.size = (
            experiment.generator(),
            (experiment.data.height, experiment.data.width),
        )
        self.scenes = [source.scene(i) for i in range(count)]
        self.records = [source[i] for i in range(count)]
        self.seeds = [SEED + i for i in range(count)]

    def truths(self, fps: float | None = None) -> list[dict]:
        times = np.arange(self.frames) / (fps or self.fps)
        return [scene_truth(scene, times, *self.size) for scene in self.scenes]

    def signal(self, name: str) -> dict[str, np.ndarray]:
        """Entries of the batch for a signal, as the scenes have it."""
        times, rng = np.arange(self.frames) / self.fps, np.random.default_rng(SEED)
        points = self.experiment.clip.flow_points if self.experiment.clip else 0
        rows = [
            read_signals(
                (name,), Clip(record, times, self.fps, record.read(times), self.size, points, rng)
            )
            for record in self.records
        ]
        return {name: np.stack([row[name] for row in rows])}

    def draw(
        self, controls: Mapping[str, np.ndarray], fps: float | None = None, words: bool = True
    ) -> np.ndarray:
        prompts = [record.caption if words else "" for record in self.records]
        return to_uint8(
            self.generator(
                self.params,
                prompts,
                self.seeds,
                num_frames=self.frames,
                fps=fps or self.fps,
                controls=controls,
            )
        )


def steering(experiment: Experiment, params: Params) -> list[dict]:
    """Rows of `steering_scores` for every signal that the model reads, of `config.eval.steering`
    clips each, with the value of the same clips drawn "without" the signal. What the words tell as
    well is drawn without them."""
    source, signals = experiment.source(validation=True), set(experiment.model.signals)
    drawing = Drawing(experiment, params, source, experiment.eval.steering)
    truths, plain, rows = drawing.truths(), drawing.draw({}), []

    def add(kind: str, videos: np.ndarray, without: np.ndarray, asked: Sequence[Mapping]) -> None:
        score = control_scores(kind, list(videos), asked, drawing.fps)
        rows.append(
            score | {"without": control_scores(kind, list(without), asked, drawing.fps)["model"]}
        )

    if "known_frames" in signals:
        pixels = np.stack([truth["video"] for truth in truths])
        known = np.asarray(experiment.objective.clean({"video": jnp.asarray(pixels)}))
        kinds = {"first_frame": [0], "last_frame": [0, -1]}
        if not experiment.model.signals["known_frames"].get("last", KnownFrames.last):
            del kinds["last_frame"]
        for name, places in kinds.items():
            mask = np.zeros(pixels.shape[:2], np.float32)
            mask[:, places] = 1.0
            videos = drawing.draw(
                {"known": known * mask[..., None, None, None], "known_mask": mask}
            )
            for kind in measures(name):
                add(kind, videos, plain, truths)
    if "motion" in signals:  # not what the words mean, but any strength there is
        usual = sorted(truth["motion"] for truth in truths)
        asked = np.random.default_rng(SEED).permutation(usual)
        add(
            "motion",
            drawing.draw({"motion": asked.astype(np.float32)}),
            plain,
            [{**truth, "motion": value} for truth, value in zip(truths, asked, strict=True)],
        )
    silent = drawing.draw({}, words=False) if signals & set(WORDLESS) else plain
    for name in sorted(
        signals & {metric.signal for metric in CONTROL_METRICS.values()} & set(SIGNALS) - {"motion"}
    ):
        words = name not in WORDLESS
        videos = drawing.draw(drawing.signal(name), words=words)
        for kind in measures(name):
            add(kind, videos, plain if words else silent, truths)
    rates = experiment.clip.rates if experiment.clip else ()
    if "fps" in signals and len(set(rates)) > 1:
        rows.append(frame_rate(experiment, params, source, (min(rates), max(rates))))
    return rows


def measures(signal: str) -> list[str]:
    return [kind for kind, metric in CONTROL_METRICS.items() if metric.signal == signal]


def frame_rate(
    experiment: Experiment, params: Params, source: Scenes, rates: tuple[float, float]
) -> dict:
    """The row of the frame rate, of objects that go one way: the same words and noise at both."""
    ways = tuple(motion for motion in source.motions if motion in VELOCITIES)
    drawing = Drawing(
        experiment, params, dataclasses.replace(source, motions=ways), experiment.eval.steering
    )
    clips, truths = [drawing.draw({}, rate) for rate in rates], [drawing.truths(r) for r in rates]
    pairs = lambda two: [one for pair in zip(*two, strict=True) for one in pair]
    score = control_scores("fps", pairs(clips), pairs(truths), list(rates) * len(clips[0]))
    return score | {"without": math.log2(rates[1] / rates[0])}  # a model that does not listen


def confusion(truth: list[dict], read: list[dict]) -> dict[str, dict[str, dict[str, int]]]:
    """For each attribute {what was asked: {what was read: clips}}."""
    out: dict = {name: {} for name in ATTRIBUTES}
    for wanted, got in zip(truth, read, strict=True):
        for name in ATTRIBUTES:
            row = out[name].setdefault(wanted[name], {})
            row[got[name]] = row.get(got[name], 0) + 1
    return out


def table(result: dict) -> str:
    """The scores as lines of text."""
    return "\n\n".join(
        [
            *([following_table(result)] if "scores" in result else []),
            *([steering_table(result["steering"])] if "steering" in result else []),
        ]
    )


def steering_table(rows: list[dict]) -> str:
    lines = [
        f"{'signal':14}{'measure':34}{'unit':10}{'model':>9}{'without':>9}{'other':>9}"
        f"{'true':>9}{'goal':>9}"
    ]
    for row in rows:
        numbers = "".join(f"{row[k]:9.3g}" for k in ("model", "without", "control", "true", "goal"))
        lines.append(
            f"{row['signal']:14}{row['measure']:34}{row['unit']:10}{numbers}"
            f"  {'reached' if row['reached'] else 'not reached'}"
        )
    return "\n".join(
        [
            *lines,
            "without: the signal; other: against what other clips asked; true: "
            "the reader on true renders",
        ]
    )


def following_table(result: dict) -> str:
    lines = [
        f"{result['prompts']} held-out prompts, step {result['step']}, {result['sampler']} "
        f"{result['steps']} steps, guidance {result['guidance']:g}",
        f"{'':8} {'model':>8} {'chance':>8} {'reader on true renders':>24}",
    ]
    lines += [
        f"{name:8} {value:8.1%} {result['chance'][name]:8.1%} {result['true_renders'][name]:24.1%}"
        for name, value in result["scores"].items()
    ]
    return "\n".join(lines)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; options start with --.")
    enable_compilation_cache()
    workdir = Path(FLAGS.workdir)
    experiment = load(workdir)
    mesh = experiment.mesh_spec.make()
    with jax.set_mesh(mesh):
        params, step, _ = open_params(experiment, workdir, mesh, step=FLAGS.step)
        print(table(evaluate_run(experiment, params, workdir, step)))
    print(f"Open {write_report(workdir)}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The workdir of a run of vdx.main.", required=True)
    flags.DEFINE_string("step", None, 'A step, or "best"; default: the newest that verifies.')
    logging.set_verbosity(logging.WARNING)
    app.run(main)
