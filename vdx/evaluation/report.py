"""The run page: everything that a run's workdir knows about the run, in one `report.html`.

The page needs no network and no server: the workdir can be copied anywhere and opened from
disk. It can be written at any moment of a run; what is not there yet is said to be not yet.
All text from files is escaped, since captions come from anywhere, and workdirs from strangers:
the page shows no file outside the workdir, and runs no script but its own and plotly's. The
page's frame, its style and the look of all charts are in `report_template.html`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs

from vdx.data.bad_records import read_bad_records
from vdx.files import atomic_write, read_rows

__all__ = ["write_report"]

PLOTLY = "report/plotly.min.js"
POINTS = 1500  # of one curve that are drawn
COLUMNS = 6  # steps on the wall of samples
EXAMPLES = 32  # judged clips that are not folded away
BAD_RECORDS = 20  # that are listed
BLUE, ORANGE, GREEN, GREY = "#3b7dd8", "#e07b39", "#2c9c69", "#8a94a0"
LEVELS = ["rgb(59,125,216)", "rgb(176,88,178)", "rgb(226,128,52)"]  # of noise, low to high
NOT_YET = '<p class="empty">Not yet.</p>'
Rows = Mapping[int, Mapping[str, Any]]  # logged values by step, in the order of steps


def write_report(workdir: Path) -> Path:
    """Writes `<workdir>/report.html`, and beside it plotly.js once; returns the page's path.

    Raises ValueError if the workdir has no config.json, so is not a run's.
    """
    config = _read_json(workdir / "config.json")
    if config is None:
        raise ValueError(f"{workdir} has no readable config.json, so it is not a run's workdir.")
    run, result = (_read_object(workdir / name) for name in ("run.json", "eval.json"))
    rows = _read_metrics(workdir / "metrics.jsonl")
    page = Template(Path(__file__).with_name("report_template.html").read_text()).substitute(
        title=escape(workdir.resolve().name),
        plotly=PLOTLY,
        subtitle=escape(f"step {max(rows, default=0):,} · {run.get('device', 'no device yet')}"),
        numbers=_piece(_numbers, rows, run, result),
        samples=_piece(_samples, workdir),
        following=_piece(_following, workdir, result),
        losses=_piece(_losses, rows),
        noise_levels=_piece(_noise_levels, rows),
        bad_records=_piece(_bad_records, workdir),
        optimization=_piece(_optimization, rows),
        throughput=_piece(_throughput, rows),
        run=_piece(_facts, run),
        config=escape(json.dumps(config, indent=2, ensure_ascii=False)),
    )
    script, there = get_plotlyjs().encode(), workdir / PLOTLY
    if not there.is_file() or there.read_bytes() != script:  # a stranger's would run in the page
        _write(there, script)
    return _write(workdir / "report.html", page.encode(errors="replace"))


def _write(path: Path, content: bytes) -> Path:
    """Whole or not at all, for the browser that reloads while a run is writing."""
    with atomic_write(path) as part:
        part.write_bytes(content)
    return path


def _piece(draw: Callable[..., str], *arguments: Any) -> str:
    """draw(*arguments); files that vdx did not write must not stop the run that asks for it."""
    try:
        return draw(*arguments)
    except Exception as error:
        return f'<p class="empty">Cannot be shown: {escape(f"{type(error).__name__}: {error}")}</p>'


def _read_json(path: Path) -> Any:
    """None for what is not there, or not wholly written."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _read_object(path: Path) -> Mapping[str, Any]:
    found = _read_json(path)
    return found if isinstance(found, dict) else {}


def _read_metrics(path: Path) -> Rows:
    """A resumed run logs some steps again: of each value of a step the last counts.

    Values and not rows, since training and evaluation log a row each for one step.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        if isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


def _series(rows: Rows, key: str) -> dict[int, float]:
    """{step: value} where the value was logged."""
    return {
        step: float(row[key]) for step, row in rows.items() if isinstance(row.get(key), int | float)
    }


def _chart(
    title: str,
    traces: Sequence[Any],
    y: str,
    x: str = "training step",
    log: bool = False,
    height: int = 330,
    **axes: Mapping[str, Any],
) -> str:
    """A plotly figure as JSON, which the page's script draws; "" of no traces."""
    # Without a format, plotly labels 0.2 on a logarithmic axis as a bare small 2.
    scale = {"type": "log", "tickformat": ".3~g", "nticks": 3} if log else {}
    figure = go.Figure(
        traces,
        go.Layout(
            template="none",
            height=height,
            xaxis={"title": {"text": x}, **axes.get("xaxis", {})},
            yaxis={"title": {"text": y}, **scale, **axes.get("yaxis", {})},
        ),
    )
    text = figure.to_json(engine="json").replace("<", "\\u003c")  # cannot end the script element
    return (
        (
            f'<figure class="chart"><h3>{escape(title)}</h3><div style="height:{height}px"></div>'
            f'<script type="application/json">{text}</script></figure>'
        )
        if traces
        else ""
    )


def _charts(*charts: str) -> str:
    """Side by side where the window is wide enough."""
    return f'<div class="charts">\n{"".join(charts)}\n</div>' if any(charts) else NOT_YET


def _curve(rows: Rows, key: str, name: str, colour: str, smooth: bool = False, **line: Any):
    """[trace], or [] if it was not logged. smooth: means over a fiftieth of the curve."""
    found = _series(rows, key)
    steps, values = list(found), np.array(list(found.values()))
    if smooth and (half := len(steps) // 100):
        finite, box = np.isfinite(values), np.ones(2 * half + 1)
        total = np.convolve(np.where(finite, values, 0.0), box, "same")
        count = np.convolve(finite, box, "same")
        values = np.where(finite, total / np.maximum(count, 1.0), np.nan)
    drawn = sorted({*range(0, len(steps), math.ceil(len(steps) / POINTS) or 1), len(steps) - 1})
    return (
        [
            go.Scatter(
                x=[steps[i] for i in drawn],
                y=[float(f"{values[i]:.5g}") for i in drawn],
                mode="lines+markers" if len(steps) < 25 else "lines",
                name=escape(name),
                line={"color": colour, "width": 2, **line},
                marker={"size": 5},
                hovertemplate="%{y:.4g} at step %{x}",
            )
        ]
        if steps
        else []
    )


def _losses(rows: Rows) -> str:
    traces = _curve(rows, "train/loss", "training", BLUE, width=1)
    for trace in traces:
        trace.update(opacity=0.3, showlegend=False)
    traces += _curve(rows, "train/loss", "training", BLUE, smooth=True)
    for split, name, colour in (
        ("train_eval", "seen clips", GREEN),
        ("validation", "held out", ORANGE),
    ):
        traces += _curve(rows, f"{split}/loss", name, colour)
        traces += _curve(
            rows, f"{split}/loss_null", f"{name}, captions dropped", colour, dash="dot"
        )
    return _charts(_chart("", traces, "loss", log=True, height=430))


def _noise_levels(rows: Rows) -> str:
    charts, latest = [], []
    for split, name, colour in (
        ("train", "training", BLUE),
        ("validation", "held-out", ORANGE),
        ("train_eval", "seen clips", GREEN),
    ):
        start = f"{split}/loss_t"
        keys = sorted({k for r in rows.values() for k in r if re.fullmatch(start + r"[\d.-]+", k)})
        shades = sample_colorscale(LEVELS, np.linspace(0, 1, max(len(keys), 2)).tolist())
        traces = [
            trace
            for key, shade in zip(keys, shades, strict=False)
            for trace in _curve(
                rows, key, key.replace(start, "t = ").replace("-", "–"), shade, split == "train"
            )
        ]
        if split != "train_eval":
            charts.append(_chart(f"By noise level, {name}", traces, "loss", log=True))
        if split != "train" and traces:
            latest.append(
                go.Scatter(
                    x=[key.removeprefix(start) for key in keys],
                    y=[trace.y[-1] for trace in traces],
                    name=name,
                    mode="lines+markers",
                    line={"color": colour},
                )
            )
    return _charts(*charts, _chart("Latest evaluation", latest, "loss", "noise level t", log=True))


def _single(rows: Rows, key: str, title: str, y: str, log: bool = False, form: str = "") -> str:
    """The chart of one logged value; form: of the ticks' numbers."""
    axis: dict[str, Any] = {} if log else {"rangemode": "tozero", "tickformat": form}
    return _chart(title, _curve(rows, key, "", BLUE, width=1.3), y, log=log, yaxis=axis)


def _optimization(rows: Rows) -> str:
    return _charts(
        _single(rows, "train/learning_rate", "Learning rate", "learning rate", form="~e"),
        _single(rows, "train/grad_norm", "Gradient norm", "global norm", log=True),
    )


def _throughput(rows: Rows) -> str:
    return _charts(
        _single(rows, "speed/clips_per_s", "Training speed", "clips / s"),
        _single(rows, "speed/data_wait", "Waiting for data", "share of time", form=".0%"),
        _single(rows, "speed/tokens_per_s", "Tokens", "tokens / s"),
        _single(rows, "speed/mfu", "Model FLOPs utilization", "share of the peak", form=".0%"),
        _single(rows, "speed/peak_memory_gib", "Most memory used", "GiB of a device"),
    )


def _numbers(rows: Rows, run: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The header's big numbers. Speeds are medians: the first rows hold the compilation."""

    def logged(key: str, form: str, pick=lambda values: values[-1]) -> str:
        values = list(_series(rows, key).values())
        return format(pick(values), form) if values else ""

    right, chance = (
        f"{result[key]['all']:.1%}" if "all" in result.get(key, {}) else ""
        for key in ("scores", "chance")
    )
    cells = [
        ("prompt following", right, f"all attributes; chance {chance or '–'}"),
        (
            "held-out loss",
            logged("validation/loss", ".4g"),
            f"{logged('validation/loss_null', '.4g') or '–'} without captions",
        ),
        ("clips / s", logged("speed/clips_per_s", ",.1f", np.median), "median"),
        ("waiting for data", logged("speed/data_wait", ".1%", np.median), "median of time"),
        ("hours of training", logged("seconds", ".3g", lambda values: values[-1] / 3600), ""),
        ("parameters", f"{run['params'] / 1e6:,.1f} M" if run.get("params") else "", ""),
    ]
    return "\n".join(
        f'<div class="number"><span>{name}</span>'
        + (
            f'<b>{value}</b><span class="muted">{note}</span></div>'
            if value
            else '<b class="empty">not yet</b></div>'
        )
        for name, value, note in cells
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """head, lines: the cells as HTML; kind: the CSS class."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _video(workdir: Path, file: Any) -> str:
    """A looping clip, or a dash if the workdir itself holds no such file: a link that leaves it
    would be lost when it is copied, and a stranger's may lead anywhere."""
    path = PurePosixPath(str(file))
    try:
        shown = (
            not path.is_absolute()
            and ".." not in path.parts
            and (workdir / path).is_file()
            and (workdir / path).resolve().is_relative_to(workdir.resolve())
        )
    except OSError:  # a name that no file can have
        shown = False
    return (
        f'<video src="{quote(str(path))}" autoplay loop muted playsinline></video>'
        if shown
        else '<div class="hole">–</div>'
    )


def _samples(workdir: Path) -> str:
    """The wall: a row a prompt, a column a step, the latest step last and large."""
    found = {
        d.name: _read_json(d / "samples.json")
        for d in sorted(workdir.glob("samples/*"))
        if re.fullmatch("[0-9]{1,15}", d.name)
    }
    taken = [
        (int(step), {(c["prompt"], c["seed"]): f"samples/{step}/{c['file']}" for c in clips})
        for step, clips in found.items()
        if clips
    ]
    if not taken:
        return NOT_YET
    ends = np.linspace(0, len(taken) - 1, min(COLUMNS, len(taken)))
    shown = [taken[i] for i in np.rint(ends).astype(int)]
    lines = (
        [
            f'{escape(prompt)}<br><span class="muted">seed {escape(str(seed))}</span>',
            *(_video(workdir, files.get((prompt, seed), "")) for _, files in shown),
        ]
        for prompt, seed in shown[-1][1]
    )
    return _table(["", *(f"step {step:,}" for step, _ in shown)], lines, "wall")


def _following(workdir: Path, result: Mapping[str, Any]) -> str:
    """Generated clips, read for the attributes that their prompts ask for."""
    steered = _steering(result.get("steering", []))
    if not (scores := result.get("scores")):
        return steered or NOT_YET
    setting = " · ".join(
        f"{name} {result[key]}"
        for key, name in (
            ("step", "training step"),
            ("prompts", "prompts:"),
            ("sampler", "sampler"),
            ("steps", "sampling steps:"),
            ("guidance", "guidance"),
        )
        if key in result
    )
    tag = (
        '<span class="tag wrong">not passed</span>'
        if not result.get("passed", True)
        else '<span class="tag ok">passed</span>'
        if "passed" in result
        else ""
    )
    columns = {
        "generated clips": (scores, BLUE),
        "chance": (result.get("chance", {}), GREY),
        "reader on true renders": (result.get("true_renders", {}), GREEN),
    }
    table = _table(
        ["attribute", *columns],
        ([escape(k), *(f"{v.get(k, math.nan):.1%}" for v, _ in columns.values())] for k in scores),
        "values",
    )
    bars = [
        go.Bar(
            x=[escape(k) for k in scores],
            y=[v.get(k) for k in scores],
            name=name,
            marker={"color": colour, "line": {"width": 0}},
            hovertemplate="%{x}: %{y:.1%}",
        )
        for name, (v, colour) in columns.items()
    ]
    chart = _chart(
        "",
        bars,
        "share of clips right",
        "attribute",
        height=280,
        yaxis={"range": [0, 1.04], "tickformat": ".0%"},
    )
    maps = [_confusion(name, counts) for name, counts in result.get("confusion", {}).items()]
    return (
        f'<p class="muted">{escape(setting)}{tag}</p>\n'
        + _charts(table, chart)
        + _charts(*maps)
        + _examples(workdir, result.get("examples", []))
        + steered
    )


def _steering(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each measure of how a signal is obeyed."""

    def line(row: Mapping[str, Any]) -> list[str]:
        numbers = [
            f"{row.get(key, math.nan):.3g}"
            for key in ("model", "without", "control", "true", "goal")
        ]
        verdict = (
            '<span class="ok">✓</span>' if row.get("reached") else '<span class="wrong">✗</span>'
        )
        return [escape(str(row.get(key, ""))) for key in ("signal", "measure", "unit")] + [
            *numbers,
            verdict,
        ]

    return (
        "<h3>Steering</h3>"
        + _table(
            [
                "signal",
                "measure",
                "unit",
                "model",
                "without the signal",
                "against other clips' signals",
                "reader on true renders",
                "goal",
                "",
            ],
            map(line, rows),
            "values",
        )
        if rows
        else ""
    )


def _confusion(name: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """counts: {asked: {read: clips}}; each line is coloured by its shares."""
    reads = list(dict.fromkeys([*counts, *(read for line in counts.values() for read in line)]))
    table = [[line.get(read, 0) for read in reads] for line in counts.values()]
    trace = go.Heatmap(
        z=[[n / max(sum(line), 1) for n in line] for line in table],
        x=[escape(k) for k in reads],
        y=[escape(k) for k in counts],
        zmin=0,
        zmax=1,
        text=[[n or "" for n in line] for line in table],
        texttemplate="%{text}",
        xgap=2,
        ygap=2,
        showscale=False,
        hovertemplate="asked %{y}, read %{x}: %{text}<extra></extra>",
    )
    return _chart(
        f"{name}: asked and read",
        [trace],
        "asked",
        "read in the clip",
        height=110 + 27 * len(table),
        yaxis={"autorange": "reversed"},
    )


def _examples(workdir: Path, examples: Sequence[Mapping[str, Any]]) -> str:
    tiles = []
    for example in examples:
        read = example.get("read", {})
        wrong = "; ".join(
            f"{k}: {read.get(k)}"
            for k, asked in example.get("truth", {}).items()
            if read.get(k) != asked
        )
        verdict = (
            '<span class="ok">✓</span>'
            if example.get("ok")
            else f'<span class="wrong">✗ {escape(wrong)}</span><br>'
        )
        tiles.append(
            f"<figure>{_video(workdir, example['file'])}<figcaption>{verdict} "
            f"{escape(example['prompt'])}</figcaption></figure>"
        )
    more = len(tiles) - EXAMPLES
    rest = (
        (
            f'<details><summary>{more} more</summary><div class="examples">'
            + "\n".join(tiles[EXAMPLES:])
            + "</div></details>"
        )
        if more > 0
        else ""
    )
    return (
        f"<h3>{len(tiles)} judged clips: ✓ read as asked, ✗ what was read instead</h3>"
        '<div class="examples">' + "\n".join(tiles[:EXAMPLES]) + f"</div>{rest}"
    )


def _bad_records(workdir: Path) -> str:
    bad = read_bad_records(workdir / "bad_records.jsonl")
    return (
        f"<p>{len(bad):,} skipped. The first {min(BAD_RECORDS, len(bad))}:</p>"
        + _table(
            ["record", "reason"],
            (
                [escape(str(row.get(key, ""))) for key in ("key", "reason")]
                for row in bad[:BAD_RECORDS]
            ),
        )
        if bad
        else "<p>None skipped.</p>"
    )


def _facts(run: Mapping[str, Any]) -> str:
    facts = {**run, **{f"{name} version": v for name, v in run.get("versions", {}).items()}}
    return (
        _table(
            [],
            (
                [escape(k), f"<code>{escape(str(v))}</code>"]
                for k, v in facts.items()
                if k != "versions"
            ),
            "facts",
        )
        if run
        else NOT_YET
    )
