"""Pieces of the report's HTML: tables, charts, clips.

The caller escapes text from files in the cells of tables; names of traces are escaped here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np
import plotly.graph_objects as go

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "NOT_YET",
    "ORANGE",
    "LoggedRows",
    "chart",
    "charts",
    "curve",
    "format_number",
    "series",
    "table",
    "verdict",
    "video",
]

BLUE = "#3b7dd8"
ORANGE = "#e07b39"
GREEN = "#2c9c69"
GREY = "#8a94a0"
POINTS = 1500  # points drawn of one curve: more than a screen has pixels
FEW = 25  # points of a curve below which each one gets a marker
NOT_YET = '<p class="empty">Not yet.</p>'

LoggedRows = Mapping[int, Mapping[str, Any]]  # logged values by step, in the order of steps


def table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """Return an HTML table; the cells are HTML, `kind` is the CSS class."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    rows = ["".join(f"<td>{cell}</td>" for cell in line) for line in lines]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def format_number(value: Any, form: str = ".3g") -> str:
    """Format a number, or returns a dash for None and NaN, which mean inconclusive."""
    if value is None:
        return "–"
    if isinstance(value, float) and math.isnan(value):
        return "–"
    return format(value, form)


def verdict(good: Any) -> str:
    """Return a green tick or a red cross."""
    if good:
        return '<span class="ok">✓</span>'
    return '<span class="wrong">✗</span>'


def video(workdir: Path, file: Any) -> str:
    """Return a looping clip, or a dash if the workdir itself holds no such file.

    A link that leaves the workdir would be lost when it is copied, and a stranger's may lead
    anywhere, so it is not followed.
    """
    path = PurePosixPath(str(file))
    if not _is_inside(workdir, path):
        return '<div class="hole">–</div>'
    return f'<video src="{quote(str(path))}" autoplay loop muted playsinline></video>'


def _is_inside(workdir: Path, path: PurePosixPath) -> bool:
    if path.is_absolute() or ".." in path.parts:
        return False
    try:
        target = workdir / path
        return target.is_file() and target.resolve().is_relative_to(workdir.resolve())
    except (OSError, ValueError):  # a name that no file can have
        return False


def chart(
    title: str,
    traces: Sequence[Any],
    y: str,
    x: str = "training step",
    log: bool = False,
    height: int = 330,
    **axes: Mapping[str, Any],
) -> str:
    """Return a plotly figure as JSON, which the page's script draws; "" for no traces."""
    if not traces:
        return ""

    # Without a format, plotly labels 0.2 on a logarithmic axis as a bare small 2.
    scale = {"type": "log", "tickformat": ".3~g", "nticks": 3} if log else {}
    layout = go.Layout(
        template="none",
        height=height,
        xaxis={"title": {"text": x}, **axes.get("xaxis", {})},
        yaxis={"title": {"text": y}, **scale, **axes.get("yaxis", {})},
    )
    figure = go.Figure(traces, layout)

    # The label of a trace must not end the script element.
    text = figure.to_json(engine="json").replace("<", "\\u003c")
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3><div style="height:{height}px"></div>'
        f'<script type="application/json">{text}</script></figure>'
    )


def charts(*pieces: str) -> str:
    """Lay charts out side by side where the window is wide enough."""
    if not any(pieces):
        return NOT_YET
    return f'<div class="charts">\n{"".join(pieces)}\n</div>'


def series(rows: LoggedRows, key: str) -> dict[int, float]:
    """Return {step: value} where the value was logged."""
    found = {}
    for step, row in rows.items():
        if isinstance(row.get(key), int | float):
            found[step] = float(row[key])
    return found


def curve(
    rows: LoggedRows, key: str, name: str, colour: str, smooth: bool = False, **line: Any
) -> list[Any]:
    """Return [trace] of a logged value, or [] if it was not logged.

    With `smooth`, each point is the mean over a fiftieth of the curve.
    """
    found = series(rows, key)
    if not found:
        return []
    steps = list(found)
    values = np.array(list(found.values()))
    if smooth:
        values = _running_mean(values, len(steps) // 100)

    # Thin out long curves, but keep the last point.
    stride = math.ceil(len(steps) / POINTS) or 1
    drawn = sorted({*range(0, len(steps), stride), len(steps) - 1})

    # Few points get markers, since a line of one point is invisible.
    trace = go.Scatter(
        x=[steps[i] for i in drawn],
        y=[float(f"{values[i]:.5g}") for i in drawn],
        mode="lines+markers" if len(steps) < FEW else "lines",
        name=escape(name),
        line={"color": colour, "width": 2, **line},
        marker={"size": 5},
        hovertemplate="%{y:.4g} at step %{x}",
    )
    return [trace]


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Average the finite values up to `half` places away; NaN where none is finite."""
    if not half:
        return values
    finite = np.isfinite(values)
    box = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, values, 0.0), box, "same")
    count = np.convolve(finite, box, "same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)
