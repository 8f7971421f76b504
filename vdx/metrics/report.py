"""The run page: everything that a run's workdir knows about the run, in one `report.html`.

The page needs no network and no server: the workdir can be copied anywhere and opened from
disk. It can be written at any moment of a run; what is not there yet is said to be not yet.
All text from files is escaped, since captions come from anywhere.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs

__all__ = ["write_report"]

PLOTLY = "report/plotly.min.js"
POINTS = 1500            # of one curve that are drawn
COLUMNS = 6              # steps on the wall of samples
EXAMPLES = 32            # judged clips that are not folded away
BAD_RECORDS = 20         # that are listed
BLUE, ORANGE, GREEN, GREY = "#3b7dd8", "#e07b39", "#2c9c69", "#8a94a0"
Rows = Mapping[int, Mapping[str, Any]]  # logged values by step, in the order of steps


def write_report(workdir: Path) -> Path:
    """Writes `<workdir>/report.html`, and beside it plotly.js once; returns the page's path.

    Raises ValueError if the workdir has no config.json, so is not a run's.
    """
    workdir = Path(workdir)
    config = _read_json(workdir / "config.json")
    if config is None:
        raise ValueError(f"No readable config.json in {workdir}: a run page is written for the "
                         "workdir of a run, which has one.")
    run = _read_json(workdir / "run.json") or {}
    result = _read_json(workdir / "eval.json") or {}
    rows = _read_metrics(workdir / "metrics.jsonl")
    sections = {"Samples": _samples(workdir), "Prompt following": _following(workdir, result),
                "Loss": _losses(rows), "Noise levels": _noise_levels(rows),
                "Optimization": _optimization(rows), "Throughput": _throughput(rows),
                "Bad records": _bad_records(workdir / "bad_records.jsonl"),
                "Config": _config(config), "Run": _facts(run)}
    page = Template(Path(__file__).with_name("report_template.html").read_text()).substitute(
        title=escape(workdir.resolve().name), plotly=PLOTLY, subtitle=_subtitle(rows, run),
        numbers=_numbers(rows, run, result),
        links="\n".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections),
        sections="\n".join(f'<section id="{_anchor(name)}">\n<h2>{name}</h2>\n{body}\n</section>'
                           for name, body in sections.items()))
    script = get_plotlyjs().encode()
    there = workdir / PLOTLY
    if not there.exists() or there.stat().st_size != len(script):
        _write(there, script)
    return _write(workdir / "report.html", page.encode())


# Files


def _write(path: Path, content: bytes) -> Path:
    """Whole or not at all, for the browser that reloads while a run is writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    return temporary.replace(path)


def _read_json(path: Path) -> Any:
    """None for what is not there, or not wholly written."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a killed run may have left half a line."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_metrics(path: Path) -> Rows:
    """A resumed run logs some steps again, and the later value of a step is the one that counts.

    Training and evaluation log rows of their own for the same step, so values are merged.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in _read_lines(path):
        if isinstance(row.get("step"), int):
            rows.setdefault(row["step"], {}).update(row)
    return dict(sorted(rows.items()))


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    found = [(step, float(row[key])) for step, row in rows.items()
             if isinstance(row.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


# Pieces of HTML


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _empty(what: str) -> str:
    return f'<p class="empty">Not yet: {what}</p>'


def _table(head: Sequence[str], body: Iterable[Sequence[Any]], values: bool = False) -> str:
    """values: all columns but the first hold numbers, and are set to the right."""
    mark = [' class="value"' if values and i else "" for i in range(len(head))]
    top = "".join(f"<th{m}>{escape(h)}</th>" for m, h in zip(mark, head, strict=True))
    lines = ("<tr>" + "".join(f"<td{m}>{escape(str(c))}</td>"
                              for m, c in zip(mark, line, strict=True)) + "</tr>" for line in body)
    return (f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>'
            + "\n".join(lines) + "</tbody></table></div>")


def _video(workdir: Path, file: str) -> str:
    """A looping clip; "" if the file is not in the workdir."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or not (workdir / path).is_file():
        return ""
    return f'<video src="{quote(str(path))}" autoplay loop muted playsinline></video>'


def _percent(share: Any) -> str:
    return f"{share:.0%}" if isinstance(share, int | float) else "–"


def _large(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


# Charts


def _chart(title: str, traces: Sequence[Any], y: str, x: str = "training step",
           log: bool = False, height: int = 330, **axes: Mapping[str, Any]) -> str:
    """A plotly figure as JSON, which the page's script draws in the colours of the page.

    axes: `xaxis` and `yaxis`, plotly's settings beyond the titles.
    """
    common = {"automargin": True, "zeroline": False, "ticks": ""}
    # Without a format, plotly labels 0.2 on a logarithmic axis as a bare small 2.
    scale = {"type": "log", "tickformat": ".3~g"} if log else {}
    figure = go.Figure(traces, go.Layout(
        template="none", height=height, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"family": "system-ui, sans-serif", "size": 12},
        margin={"l": 8, "r": 12, "t": 8, "b": 8}, hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        xaxis={**common, "title": {"text": x, "standoff": 8}, **axes.get("xaxis", {})},
        yaxis={**common, "title": {"text": y, "standoff": 8}, **scale, **axes.get("yaxis", {})}))
    text = figure.to_json(engine="json").replace("<", "\\u003c")  # cannot end the script element
    return (f'<figure class="chart"><h3>{escape(title)}</h3><div></div>'
            f'<script type="application/json">{text}</script></figure>')


def _charts(*charts: str) -> str:
    return '<div class="charts">\n' + "\n".join(c for c in charts if c) + "\n</div>"


def _curve(rows: Rows, key: str, name: str, colour: str, smooth: bool = False, **line: Any):
    """Traces of one logged value, smoothed over a fiftieth of the curve if asked; maybe none."""
    steps, values = _series(rows, key)
    if not steps:
        return []
    array = np.array(values)
    if smooth and (width := len(values) // 50) > 1:
        finite, box = np.isfinite(array), np.ones(2 * (width // 2) + 1)
        near = np.convolve(finite, box, "same")
        total = np.convolve(np.where(finite, array, 0.0), box, "same")
        array = np.where(finite, total / np.maximum(near, 1.0), np.nan)
    chosen = sorted({*range(0, len(steps), math.ceil(len(steps) / POINTS)), len(steps) - 1})
    mode = "lines+markers" if len(steps) < 25 else "lines"
    return [go.Scatter(x=[steps[i] for i in chosen],
                       y=[float(f"{array[i]:.5g}") for i in chosen],
                       name=escape(name), mode=mode, line={"color": colour, "width": 2, **line},
                       marker={"size": 5}, hovertemplate="%{y:.4g} at step %{x}")]


def _losses(rows: Rows) -> str:
    raw = _curve(rows, "train/loss", "training, every row", BLUE, width=1)
    for trace in raw:
        trace.update(opacity=0.3, mode="lines", showlegend=False)
    traces = [*raw, *_curve(rows, "train/loss", "training", BLUE, smooth=True),
              *_curve(rows, "seen/loss", "seen clips", GREEN),
              *_curve(rows, "seen/loss_null", "seen clips, captions dropped", GREEN, dash="dot"),
              *_curve(rows, "heldout/loss", "held out", ORANGE),
              *_curve(rows, "heldout/loss_null", "held out, captions dropped", ORANGE, dash="dot")]
    if not traces:
        return _empty("no loss has been logged.")
    return ('<p class="muted">Where captions help, the loss with captions dropped lies above. '
            "Seen clips are training clips, judged like the held-out ones.</p>"
            + _charts(_chart("", traces, "loss", log=True, height=430)))


def _levels(rows: Rows, split: str) -> dict[str, str]:
    """{key: noise level} of the losses that are logged by noise level, in its order."""
    found = {key: key.removeprefix(f"{split}/loss_t") for row in rows.values() for key in row
             if re.match(rf"{split}/loss_t[\d.]", key)}
    return dict(sorted(found.items(), key=lambda item: _middle(item[1])))


def _middle(level: str) -> float:
    """Of a noise level "0.1" or of a range of them, "0.0-0.2"."""
    ends = [float(n) for n in re.findall(r"\d+\.?\d*", level)]
    return sum(ends) / len(ends) if ends else 0.0


def _noise_levels(rows: Rows) -> str:
    charts = []
    for split, title in (("train", "Training loss by noise level"),
                         ("heldout", "Held-out loss by noise level")):
        keys = _levels(rows, split)
        colours = sample_colorscale("Turbo", np.linspace(0.1, 0.9, max(len(keys), 2)).tolist())
        traces = [trace for (key, level), colour in zip(keys.items(), colours, strict=False)
                  for trace in _curve(rows, key, f"t = {level}".replace("-", "–"), colour,
                                      smooth=split == "train")]
        charts += [_chart(title, traces, "loss", log=True)] if traces else []
    last = []
    for split, name, colour in (("heldout", "held out", ORANGE), ("seen", "seen clips", GREEN)):
        values = {_middle(level): _series(rows, key)[1] for key, level in
                  _levels(rows, split).items()}
        if values := {t: v for t, v in values.items() if v}:
            last.append(go.Scatter(x=list(values), y=[v[-1] for v in values.values()], name=name,
                                   mode="lines+markers", line={"color": colour}))
    if last:
        charts.append(_chart("Latest evaluation", last, "loss", "noise level t", log=True))
    if not charts:
        return _empty("no loss has been logged by noise level.")
    return '<p class="muted">t = 0 is data and t = 1 is noise.</p>' + _charts(*charts)


def _optimization(rows: Rows) -> str:
    rate = _curve(rows, "train/learning_rate", "learning rate", BLUE)
    norm = _curve(rows, "train/grad_norm", "gradient norm", ORANGE, width=1.2)
    if not rate and not norm:
        return _empty("no training row has been logged.")
    return _charts(
        _chart("Learning rate", rate, "learning rate", yaxis={"rangemode": "tozero"}),
        _chart("Gradient norm", norm, "global norm", log=True))


def _throughput(rows: Rows) -> str:
    speed = _curve(rows, "speed/clips_per_s", "clips per second", BLUE)
    wait = _curve(rows, "speed/data_wait", "waiting for data", ORANGE)
    if not speed and not wait:
        return _empty("no speed has been logged.")
    return _charts(
        _chart("Training speed", speed, "clips / s", yaxis={"rangemode": "tozero"}),
        _chart("Time spent waiting for data", wait, "share of time",
               yaxis={"rangemode": "tozero", "tickformat": ".0%"}))


# Sections that are not curves


def _subtitle(rows: Rows, run: Mapping[str, Any]) -> str:
    facts = [f"step {max(rows):,}" if rows else "no step logged yet", run.get("device"),
             run.get("started") and f"started {run['started']}",
             run.get("commit") and f"commit {run['commit'][:10]}"]
    return escape(" · ".join(str(f) for f in facts if f))


def _numbers(rows: Rows, run: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The header's big numbers. Speeds are medians: the first rows hold the compilation."""
    def last(key: str) -> list[float]:
        return _series(rows, key)[1][-1:]

    def median(key: str) -> list[float]:
        values = _series(rows, key)[1]
        return [float(np.median(values))] if values else []

    right, chance = (result.get(k, {}).get("all") for k in ("scores", "chance"))
    null = "".join(f", {v:.4g} without captions" for v in last("heldout/loss_null"))
    cells = [
        ("prompt following", [] if right is None else [_percent(right)],
         "all attributes right" + ("" if chance is None else f", chance {_percent(chance)}")),
        ("held-out loss", [f"{v:.4g}" for v in last("heldout/loss")], "latest" + null),
        ("clips / s", [f"{v:,.0f}" if v > 99 else f"{v:.2g}" for v in median("speed/clips_per_s")], "median"),
        ("waiting for data", [f"{v:.1%}" for v in median("speed/data_wait")], "median of time"),
        ("training time", [_duration(v) for v in last("seconds")],
         f"{max(rows):,} steps" if rows else ""),
        ("parameters", [_large(run["params"])] if run.get("params") else [], "in the network")]
    return "\n".join(
        f'<div class="number"><span>{name}</span>'
        + (f"<b>{value[0]}</b>" if value else '<b class="empty">not yet</b>')
        + f'<span class="muted">{note if value else ""}</span></div>'
        for name, value, note in cells)


def _samples(workdir: Path) -> str:
    """The wall: a row a prompt, a column a step, the latest step large."""
    found = [(int(d.name), d) for d in workdir.glob("samples/*") if d.name.isdigit()]
    taken = [(step, d, clips) for step, d in sorted(found)
             if (clips := _read_json(d / "samples.json"))]
    if not taken:
        return _empty("no samples have been drawn.")
    ends = np.linspace(0, len(taken) - 1, min(COLUMNS, len(taken)))
    shown = [taken[i] for i in np.rint(ends).astype(int)]
    clips_at = [{(c["prompt"], c["seed"]): f"samples/{d.name}/{c['file']}" for c in clips}
                for _, d, clips in shown]
    mark = [""] * (len(shown) - 1) + [' class="latest"']
    lines = ["<tr><th></th>" + "".join(f"<th{m}>step {step:,}</th>" for m, (step, _, _) in
                                       zip(mark, shown, strict=True)) + "</tr></thead><tbody>"]
    for prompt, seed in clips_at[-1]:
        cells = [_video(workdir, at.get((prompt, seed), "")) or '<div class="hole">–</div>'
                 for at in clips_at]
        lines.append(f'<tr><th>{escape(prompt)}<br><span class="muted">seed {escape(str(seed))}'
                     "</span></th>" + "".join(f"<td{m}>{c}</td>" for m, c in
                                              zip(mark, cells, strict=True)) + "</tr>")
    return ('<p class="muted">Prompts and seeds are fixed for the whole run: they were drawn at '
            "random, not picked, and every column starts from the same noise.</p>\n"
            '<div class="scroll"><table class="wall"><thead>' + "\n".join(lines)
            + "</tbody></table></div>")


def _following(workdir: Path, result: Mapping[str, Any]) -> str:
    """Generated clips, read for the attributes that their prompts ask for."""
    scores = result.get("scores")
    if not scores:
        return _empty("no eval.json. It is written for prompts whose clips can be read.")
    setting = " · ".join(f"{name} {result[key]}" for key, name in (
        ("step", "step"), ("prompts", "prompts:"), ("sampler", "sampler"),
        ("steps", "sampling steps:"), ("guidance", "guidance")) if key in result)
    tag = ""
    if "passed" in result:
        tag = ('<span class="tag ok">passed</span>' if result["passed"] else
               '<span class="tag wrong">not passed</span>')
    columns = [("score", "generated clips", BLUE), ("chance", "chance", GREY),
               ("true_renders", "reader on true renders", GREEN)]
    values = {name: result.get("scores" if key == "score" else key, {}) for key, name, _ in columns}
    bars = [go.Bar(x=list(map(escape, scores)), y=[values[name].get(k) for k in scores], name=name,
                   marker={"color": colour, "line": {"width": 0}},
                   hovertemplate="%{x}: %{y:.1%}") for _, name, colour in columns]
    table = _table(["attribute", *values],
                   ([k, *(_percent(v.get(k)) for v in values.values())] for k in scores), True)
    chart = _chart("", bars, "share of clips right", "attribute", height=280,
                   yaxis={"range": [0, 1.04], "tickformat": ".0%"})
    maps = [_confusion(name, table) for name, table in result.get("confusion", {}).items()]
    return (f'<p class="muted">{escape(setting)}{tag}</p>\n' + _charts(table, chart)
            + _charts(*maps) + _examples(workdir, result.get("examples", [])))


def _confusion(name: str, table: Mapping[str, Any]) -> str:
    """table: {wanted: {read: count}}, or {"labels", "matrix"} as `prompt_following` counts."""
    if "labels" in table:
        table = {wanted: dict(zip(table["labels"], line, strict=True)) for wanted, line in
                 zip(table["labels"], table["matrix"], strict=True) if any(line)}
    reads = dict.fromkeys([*table, *(read for line in table.values() for read in line)])
    counts = [[line.get(read, 0) for read in reads] for line in table.values()]
    shares = [[n / max(sum(line), 1) for n in line] for line in counts]
    trace = go.Heatmap(
        z=shares, x=list(map(escape, reads)), y=list(map(escape, table)), zmin=0, zmax=1,
        text=[[n or "" for n in line] for line in counts], texttemplate="%{text}",
        showscale=False, xgap=2, ygap=2, hovertemplate="asked %{y}, read %{x}: %{text}")
    return _chart(f"{name}: asked and read", [trace], "asked", "read in the clip",
                  height=110 + 27 * len(table), yaxis={"autorange": "reversed", "showgrid": False},
                  xaxis={"showgrid": False, "tickangle": -45})


def _examples(workdir: Path, examples: Sequence[Mapping[str, Any]]) -> str:
    tiles = []
    for example in examples:
        read, truth = example.get("read", {}), example.get("truth", {})
        wrong = "; ".join(f"{k}: {read[k]}" for k in truth if read.get(k, truth[k]) != truth[k])
        verdict = ('<span class="ok">✓</span>' if example.get("ok") else
                   f'<span class="wrong">✗ {escape(wrong)}</span><br>')
        clip = _video(workdir, example["file"]) or '<div class="hole">–</div>'
        tiles.append(f"<figure>{clip}<figcaption>{verdict} {escape(example['prompt'])}"
                     "</figcaption></figure>")
    first, rest = "\n".join(tiles[:EXAMPLES]), "\n".join(tiles[EXAMPLES:])
    more = (f"<details><summary>{len(tiles) - EXAMPLES} more</summary>\n"
            f'<div class="examples">{rest}</div></details>') if rest else ""
    return (f'<h3 style="margin-top:22px">All {len(tiles)} judged clips</h3><p class="muted">'
            "✓ all attributes read as asked; ✗ what was read instead.</p>"
            f'<div class="examples">{first}</div>{more}') if tiles else ""


def _bad_records(path: Path) -> str:
    bad = _read_lines(path)
    if not bad:
        return '<p class="muted">No record has been skipped.</p>'
    listed = f", of which the first {BAD_RECORDS}" if len(bad) > BAD_RECORDS else ""
    return (f'<p class="muted">{len(bad):,} skipped{listed}:</p>' + _table(
        ["record", "reason"], ([b.get("key", ""), b.get("reason", "")] for b in bad[:BAD_RECORDS])))


def _config(config: Mapping[str, Any]) -> str:
    return ("<details><summary>config.json, as resolved</summary><pre>"
            + escape(json.dumps(config, indent=2, ensure_ascii=False)) + "</pre></details>")


def _facts(run: Mapping[str, Any]) -> str:
    if not run:
        return _empty("no run.json.")
    facts = {**run, **{f"{k} version": v for k, v in run.get("versions", {}).items()}}
    return _table(["fact", "value"], ([k, f"{v:,}" if isinstance(v, int) else v]
                                      for k, v in facts.items() if k != "versions"))
