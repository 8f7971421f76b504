"""The report: a run's workdir as one page, `report.html`.

The page needs no network and no server: the workdir can be copied anywhere and opened from disk.
It can be written at any moment of a run; a section without data says "not yet".
All text from files is escaped, since captions come from anywhere, and workdirs from strangers:
the page refers to no file outside the workdir, and runs no script but its own and plotly's. The
frame of the page, its style and the look of all charts are in `report_template.html`; each
evaluator shows its own scores.
"""

import json
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from vdx.evaluation import sections
from vdx.evaluation.evaluator import Evaluator, Headline
from vdx.evaluation.html import NOT_YET, LoggedRows
from vdx.evaluation.table import EVALUATORS
from vdx.evaluation.workdir_files import read_any, read_metrics, read_object, write_bytes

__all__ = ["write_report"]

PLOTLY = "report/plotly.min.js"


def write_report(workdir: Path) -> Path:
    """Write `<workdir>/report.html`, and plotly.js once; return the page's path.

    Raises ValueError if the workdir has no config.json, so is not a run's.
    """
    config = read_any(workdir / "config.json")
    if config is None:
        raise ValueError(f"{workdir} has no readable config.json, so it is not a run's workdir.")

    # Each of these may be missing.
    run = read_object(workdir / "run.json")
    result = read_object(workdir / "eval.json")
    logged = read_metrics(workdir / "metrics.jsonl")
    evaluators = _evaluators(config, result)

    template = Template(Path(__file__).with_name("report_template.html").read_text())
    page = template.substitute(
        title=escape(workdir.resolve().name),
        plotly=PLOTLY,
        subtitle=escape(f"step {max(logged, default=0):,} · {run.get('device', 'no device yet')}"),
        numbers=_piece(_numbers, evaluators, result, logged, run),
        samples=_piece(sections.samples, workdir),
        links="\n".join(_link(name, row) for name, row in evaluators.items()),
        evaluations="\n".join(
            _section(name, row, result, workdir, logged) for name, row in evaluators.items()
        ),
        bad_records=_piece(sections.bad_records, workdir),
        optimization=_piece(sections.optimization, logged),
        throughput=_piece(sections.throughput, logged),
        run=_piece(sections.facts, run),
        config=escape(json.dumps(config, indent=2, ensure_ascii=False)),
    )

    # A stranger's script would run in the page.
    script = get_plotlyjs().encode()
    path = workdir / PLOTLY
    if not path.is_file() or path.read_bytes() != script:
        write_bytes(path, script)
    return write_bytes(workdir / "report.html", page.encode(errors="replace"))


def _evaluators(config: Any, result: Mapping[str, Any]) -> dict[str, Evaluator]:
    """Return the rows that the config names or eval.json has scores of, and the loss.

    Their settings are the defaults: those of the config may be a stranger's, and are not needed.
    """
    section = config.get("eval") if isinstance(config, dict) else None
    named = section if isinstance(section, dict) else {}
    return {
        name: row()
        for name, row in EVALUATORS.items()
        if name == "loss" or name in result or named.get(name) is not None
    }


def _piece(draw: Callable[..., str], *arguments: Any) -> str:
    """Return draw(*arguments), or its error: a stranger's files stop no report."""
    try:
        return draw(*arguments)
    except Exception as error:
        return f'<p class="empty">Cannot be shown: {escape(f"{type(error).__name__}: {error}")}</p>'


def _numbers(
    evaluators: Mapping[str, Evaluator],
    result: Mapping[str, Any],
    logged: LoggedRows,
    run: Mapping[str, Any],
) -> str:
    headlines: list[Headline] = []
    for name, row in evaluators.items():
        one = row.headline(_scores(result, name), logged)
        if one is not None:
            headlines.append(one)
    return sections.headline_tiles([*headlines, *sections.speed_headlines(logged, run)])


def _scores(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = result.get(name)
    return found if isinstance(found, dict) else {}


def _link(name: str, row: Evaluator) -> str:
    return f'<a href="#{name}">{row.title}</a>'


def _section(
    name: str, row: Evaluator, result: Mapping[str, Any], workdir: Path, logged: LoggedRows
) -> str:
    body = _piece(row.section, _scores(result, name), workdir, logged) or NOT_YET
    return (
        f'<section id="{name}">\n<h2>{row.title}</h2>\n'
        f'<p class="muted">{row.about}</p>\n{body}\n</section>'
    )
