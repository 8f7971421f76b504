"""Prompt following: clips drawn for validation prompts, read back from pixels."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import jax
import plotly.graph_objects as go

from vdx.config.ranges import Count
from vdx.data.scenes.source import Scenes
from vdx.evaluation.drawing import FIRST_SEED
from vdx.evaluation.evaluator import EvaluationContext, Evaluator, Headline, Scores
from vdx.evaluation.html import (
    BLUE,
    GREEN,
    GREY,
    LoggedRows,
    chart,
    charts,
    format_number,
    table,
    verdict,
    video,
)
from vdx.generate.sample_grid import write_clips, write_sheet
from vdx.metrics.prompt_following import ATTRIBUTES, score
from vdx.types import Params

__all__ = ["PromptFollowing"]

SHEET = 12  # clips in sample_grid.webp: two rows of six
TILES = 32  # clips that the report shows without unfolding: a screen or two
Words = Mapping[str, str]  # {"colour", "shape", "motion"} of one clip


@dataclasses.dataclass(frozen=True)
class PromptFollowing(Evaluator):
    """Share of validation prompts whose colour, shape and motion the drawn clips show.

    The combinations of attributes in the validation prompts never occur in training.
    Scores: `prompts`, `sampler`, `steps`, `guidance`; `scores`, `chance` and `true_renders`, each
    a share for every attribute and "all"; `confusion`, {attribute: {prompted: {read: clips}}};
    `examples`. Writes eval/*.mp4 and eval/sample_grid.webp.
    """

    prompts: Count = 128  # a share near 0.9 is then known to 0.03 (one standard deviation)

    title: ClassVar[str] = "Prompt following"
    about: ClassVar[str] = (
        "Evaluated on prompts whose clips can be read, by a reader that does not get the prompt."
    )
    needs: ClassVar[tuple[str, ...]] = ("truth", "clips")

    def prepare(self, context: EvaluationContext) -> Callable[[Params], Scores]:
        """See Evaluator."""
        return functools.partial(self._run, context)

    def _run(self, context: EvaluationContext, params: Params) -> Scores:
        source = context.experiment.source(validation=True)
        assert isinstance(source, Scenes)

        # The first prompts, each drawn with a seed of its own.
        drawing = context.drawing
        records = [source[i] for i in range(self.prompts)]
        prompts = [record.caption for record in records]
        videos = drawing.draw(params, prompts)

        # Read the drawn clips, and the true renders for the reader's own error.
        vocabulary = {
            "colours": source.colours,
            "shapes": source.shapes,
            "motions": source.motions,
        }
        truth = [{name: record.attributes[name] for name in ATTRIBUTES} for record in records]
        drawn = score(videos, truth, drawing.fps, **vocabulary)
        renders = [record.read(drawing.times) for record in records]
        true = score(renders, truth, drawing.fps, **vocabulary)

        sampling = context.experiment.sampling
        scores = {
            "prompts": self.prompts,
            "sampler": sampling.sampler,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "scores": drawn["accuracy"],
            "chance": drawn["chance"],
            "true_renders": true["accuracy"],
            "confusion": _confusion(truth, drawn["readings"]),
        }

        # Every process has all clips; one writes them.
        if jax.process_index() == 0:
            folder = context.workdir / "eval"
            rows = write_clips(
                folder, videos, drawing.fps, _examples(prompts, truth, drawn["readings"])
            )
            write_sheet(folder / "sample_grid.webp", videos[:SHEET], prompts[:SHEET], drawing.fps)
            scores["examples"] = [{**row, "file": f"eval/{row['file']}"} for row in rows]
        return scores

    def logged(self, scores: Scores) -> dict[str, float]:
        """Return the share for each attribute; see Evaluator."""
        return {f"prompt_following/{name}": value for name, value in scores["scores"].items()}

    def text(self, scores: Scores) -> str:
        """Format a line for each attribute; see Evaluator."""
        lines = [
            f"{scores['prompts']} validation prompts, {scores['sampler']} "
            f"{scores['steps']} steps, guidance {scores['guidance']:g}",
            f"{'':8} {'model':>8} {'chance':>8} {'reader on true renders':>24}",
        ]
        for name, value in scores["scores"].items():
            chance = scores["chance"][name]
            true = scores["true_renders"][name]
            lines.append(f"{name:8} {value:8.1%} {chance:8.1%} {true:24.1%}")
        return "\n".join(lines)

    def headline(self, scores: Scores, logged: LoggedRows) -> Headline:
        """Return the share of clips with all attributes right; see Evaluator."""
        shares = {}
        for key in ("scores", "chance"):
            found = scores.get(key, {})
            shares[key] = f"{found['all']:.1%}" if "all" in found else ""
        note = f"all attributes; chance {shares['chance'] or '–'}"
        return Headline("prompt following", shares["scores"], note)

    def section(self, scores: Scores, workdir: Path, logged: LoggedRows) -> str:
        """Show shares, confusions and the drawn clips; see Evaluator."""
        if not scores.get("scores"):
            return ""
        columns = {
            "generated clips": (scores["scores"], BLUE),
            "chance": (scores.get("chance", {}), GREY),
            "reader on true renders": (scores.get("true_renders", {}), GREEN),
        }
        confusions = [
            _confusion_chart(name, counts) for name, counts in scores.get("confusion", {}).items()
        ]
        return (
            f'<p class="muted">{escape(_settings(scores))}</p>\n'
            + charts(_share_table(columns), _share_bars(columns))
            + charts(*confusions)
            + _example_tiles(workdir, scores.get("examples", []))
        )


def _examples(
    prompts: Sequence[str], truth: Sequence[Words], readings: Sequence[Words]
) -> list[dict[str, Any]]:
    rows = []
    for i, (prompt, wanted, read) in enumerate(zip(prompts, truth, readings, strict=True)):
        rows.append(
            {
                "prompt": prompt,
                "seed": FIRST_SEED + i,
                "truth": wanted,
                "read": read,
                "ok": wanted == read,
            }
        )
    return rows


def _confusion(
    truth: Sequence[Words], readings: Sequence[Words]
) -> dict[str, dict[str, dict[str, int]]]:
    """Count, for each attribute, {prompted word: {read word: clips}}."""
    counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in ATTRIBUTES}
    for wanted, read in zip(truth, readings, strict=True):
        for name in ATTRIBUTES:
            row = counts[name].setdefault(wanted[name], {})
            row[read[name]] = row.get(read[name], 0) + 1
    return counts


# The section of the report ------------------------------------------------------------------

Columns = Mapping[str, tuple[Mapping[str, float], str]]  # heading -> (shares, colour)


def _settings(scores: Scores) -> str:
    labels = {
        "step": "training step",
        "prompts": "prompts:",
        "sampler": "sampler",
        "steps": "sampling steps:",
        "guidance": "guidance",
    }
    return " · ".join(f"{label} {scores[key]}" for key, label in labels.items() if key in scores)


def _share_table(columns: Columns) -> str:
    attributes = list(columns["generated clips"][0])
    lines = []
    for name in attributes:
        cells = [format_number(shares.get(name), ".1%") for shares, _ in columns.values()]
        lines.append([escape(name), *cells])
    return table(["attribute", *columns], lines, "values")


def _share_bars(columns: Columns) -> str:
    attributes = list(columns["generated clips"][0])
    bars = [
        go.Bar(
            x=[escape(name) for name in attributes],
            y=[shares.get(name) for name in attributes],
            name=heading,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x}: %{y:.1%}",
        )
        for heading, (shares, colour) in columns.items()
    ]
    axis = {"range": [0, 1.04], "tickformat": ".0%"}
    return chart("", bars, "share of clips right", "attribute", height=280, yaxis=axis)


def _confusion_chart(name: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Draw {prompted: {read: clips}}; each line is coloured by its shares."""
    words = dict.fromkeys(counts)
    for line in counts.values():
        words |= dict.fromkeys(line)
    reads = list(words)

    # Counts as text, shares as colours.
    clips = [[line.get(read, 0) for read in reads] for line in counts.values()]
    shares = [[n / max(sum(line), 1) for n in line] for line in clips]
    trace = go.Heatmap(
        z=shares,
        x=[escape(word) for word in reads],
        y=[escape(word) for word in counts],
        zmin=0,
        zmax=1,
        text=[[n or "" for n in line] for line in clips],
        texttemplate="%{text}",
        xgap=2,
        ygap=2,
        showscale=False,
        hovertemplate="prompted %{y}, read %{x}: %{text}<extra></extra>",
    )

    return chart(
        f"{name}: prompted and read",
        [trace],
        "prompted",
        "read in the clip",
        height=110 + 27 * len(clips),
        yaxis={"autorange": "reversed"},
    )


def _example_tiles(workdir: Path, examples: Sequence[Mapping[str, Any]]) -> str:
    tiles = [_example_tile(workdir, example) for example in examples]
    visible = "\n".join(tiles[:TILES])
    more = ""
    if len(tiles) > TILES:
        hidden = "\n".join(tiles[TILES:])
        more = (
            f"<details><summary>{len(tiles) - TILES} more</summary>"
            f'<div class="examples">{hidden}</div></details>'
        )
    return (
        f"<h3>{len(tiles)} clips: ✓ read as prompted, ✗ the words that were read instead</h3>"
        f'<div class="examples">{visible}</div>{more}'
    )


def _example_tile(workdir: Path, example: Mapping[str, Any]) -> str:
    read = example.get("read", {})
    mark = verdict(example.get("ok"))
    if not example.get("ok"):
        wrong = [
            f"{name}: {read.get(name)}"
            for name, wanted in example.get("truth", {}).items()
            if read.get(name) != wanted
        ]
        mark = f'<span class="wrong">✗ {escape("; ".join(wrong))}</span><br>'
    return (
        f"<figure>{video(workdir, example['file'])}"
        f"<figcaption>{mark} {escape(example['prompt'])}</figcaption></figure>"
    )
