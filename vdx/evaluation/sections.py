"""Sections of the report that belong to no evaluator."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vdx.data.bad_records import read_bad_records
from vdx.evaluation.evaluator import Headline
from vdx.evaluation.html import (
    BLUE,
    NOT_YET,
    LoggedRows,
    chart,
    charts,
    curve,
    series,
    table,
    video,
)
from vdx.evaluation.workdir_files import read_any

__all__ = [
    "bad_records",
    "facts",
    "headline_tiles",
    "optimization",
    "samples",
    "speed_headlines",
    "throughput",
]

COLUMNS = 6  # steps of the sample grid: what a screen is wide enough for
BAD_RECORDS = 20  # records that are listed; the file has all of them


# The top of the page ------------------------------------------------------------------------


def speed_headlines(logged: LoggedRows, run: Mapping[str, Any]) -> list[Headline]:
    """Return speed, hours and size of a run.

    Speeds are medians, since the first rows include the compilation.
    """
    speed = _format_logged(logged, "speed/clips_per_s", ",.1f", np.median)
    wait = _format_logged(logged, "speed/data_wait", ".1%", np.median)
    hours = _format_logged(logged, "seconds", ".3g", lambda values: values[-1] / 3600)
    params = f"{run['params'] / 1e6:,.1f} M" if run.get("params") else ""
    return [
        Headline("clips / s", speed, "median"),
        Headline("waiting for data", wait, "median of time"),
        Headline("hours of training", hours),
        Headline("parameters", params),
    ]


def _format_logged(
    logged: LoggedRows, key: str, form: str, pick: Callable[[list[float]], Any]
) -> str:
    values = list(series(logged, key).values())
    return format(pick(values), form) if values else ""


def headline_tiles(headlines: Iterable[Headline]) -> str:
    """Return the big numbers as HTML."""
    tiles = []
    for one in headlines:
        number = '<b class="empty">not yet</b>'
        if one.value:
            number = f'<b>{one.value}</b><span class="muted">{one.note}</span>'
        tiles.append(f'<div class="number"><span>{one.name}</span>{number}</div>')
    return "\n".join(tiles)


# Samples ------------------------------------------------------------------------------------

Clips = Mapping[tuple[Any, Any], str]  # (prompt, seed) -> file


def samples(workdir: Path) -> str:
    """Show the sample grid: a row a prompt, a column a step, the latest one large."""
    steps = _sampled_steps(workdir)
    if not steps:
        return NOT_YET
    # The first, the last, and steps evenly between them.
    places = np.linspace(0, len(steps) - 1, min(COLUMNS, len(steps)))
    chosen = [steps[i] for i in np.rint(places).astype(int)]

    lines = []
    for prompt, seed in chosen[-1][1]:
        label = f'{escape(prompt)}<br><span class="muted">seed {escape(str(seed))}</span>'
        clips = [video(workdir, files.get((prompt, seed), "")) for _, files in chosen]
        lines.append([label, *clips])
    return table(["", *(f"step {step:,}" for step, _ in chosen)], lines, "grid")


def _sampled_steps(workdir: Path) -> list[tuple[int, Clips]]:
    steps: list[tuple[int, Clips]] = []
    for folder in sorted(workdir.glob("samples/*")):
        if not re.fullmatch("[0-9]{1,15}", folder.name):
            continue
        clips = read_any(folder / "samples.json")
        if clips:
            files = {
                (clip["prompt"], clip["seed"]): f"samples/{folder.name}/{clip['file']}"
                for clip in clips
            }
            steps.append((int(folder.name), files))
    return steps


# Curves -------------------------------------------------------------------------------------


def optimization(logged: LoggedRows) -> str:
    """Show the learning rate and the gradient norm."""
    return charts(
        _single(logged, "train/learning_rate", "Learning rate", "learning rate", form="~e"),
        _single(logged, "train/grad_norm", "Gradient norm", "global norm", log=True),
    )


def throughput(logged: LoggedRows) -> str:
    """Show speed, waiting, utilization and memory."""
    return charts(
        _single(logged, "speed/clips_per_s", "Training speed", "clips / s"),
        _single(logged, "speed/data_wait", "Waiting for data", "share of time", form=".0%"),
        _single(logged, "speed/tokens_per_s", "Tokens", "tokens / s"),
        _single(logged, "speed/mfu", "Model FLOPs utilization", "share of the peak", form=".0%"),
        _single(logged, "speed/peak_memory_gib", "Most memory used", "GiB of a device"),
    )


def _single(
    logged: LoggedRows, key: str, title: str, y: str, log: bool = False, form: str = ""
) -> str:
    """Return the chart of one logged value; `form` is the format of the ticks."""
    axis: dict[str, Any] = {}
    if not log:
        axis = {"rangemode": "tozero", "tickformat": form}
    return chart(title, curve(logged, key, "", BLUE, width=1.3), y, log=log, yaxis=axis)


# The run ------------------------------------------------------------------------------------


def bad_records(workdir: Path) -> str:
    """List the first records that were skipped."""
    bad = read_bad_records(workdir / "bad_records.jsonl")
    if not bad:
        return "<p>None skipped.</p>"
    lines = [
        [escape(str(row.get(key, ""))) for key in ("key", "reason")] for row in bad[:BAD_RECORDS]
    ]
    title = f"<p>{len(bad):,} skipped. The first {min(BAD_RECORDS, len(bad))}:</p>"
    return title + table(["record", "reason"], lines)


def facts(run: Mapping[str, Any]) -> str:
    """List the facts of run.json: command, commit, device, versions."""
    if not run:
        return NOT_YET
    rows = {key: value for key, value in run.items() if key != "versions"}
    for name, version in run.get("versions", {}).items():
        rows[f"{name} version"] = version
    lines: Sequence[Sequence[str]] = [
        [escape(key), f"<code>{escape(str(value))}</code>"] for key, value in rows.items()
    ]
    return table([], lines, "facts")
