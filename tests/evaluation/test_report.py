import json
import re
import time
from html.parser import HTMLParser
from urllib.parse import unquote

import plotly.graph_objects as go
import pytest

from vdx.evaluation.html import chart
from vdx.evaluation.report import write_report
from vdx.evaluation.table import EVALUATORS

HOSTILE = '</script><script>alert("x")</script><img src=https://evil.example/a.png>'
SECTIONS = (
    "samples",
    *EVALUATORS,
    "optimization",
    "throughput",
    "bad",
    "config",
    "run",
)


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def rows(steps, loss=1.0):
    """Training rows, and an evaluation row at every tenth step, as the loop logs them."""
    for step in steps:
        yield {
            "step": step,
            "seconds": 2.0 * step,
            "train/loss": loss / (1 + step),
            "train/grad_norm": 1.0,
            "train/learning_rate": 1e-3,
            "train/loss_t0.0-0.2": 2.0,
            "train/loss_t0.2-0.4": 1.0,
            "speed/clips_per_s": 100.0,
            "speed/data_wait": 0.25,
        }
        if step % 10 == 0:
            yield {
                "step": step,
                "validation/loss": 0.5,
                "validation/loss_null": 0.6,
                "validation/loss_t0.1": 0.7,
                "validation/loss_t0.3": 0.4,
                "train_eval/loss": 0.4,
                "train_eval/loss_null": 0.5,
                "train_eval/loss_t0.1": 0.6,
                "train_eval/loss_t0.3": 0.3,
            }


@pytest.fixture
def workdir(tmp_path):
    """A finished run; its clips are empty files, since the page only names them."""
    root = tmp_path / "tiny run"
    dump(
        root / "config.json",
        {
            "data": {"name": "scenes", "note": HOSTILE},
            "eval": {**{name: {} for name in EVALUATORS}, HOSTILE: {}},
        },
    )
    dump(
        root / "run.json",
        {
            "command": "python -m vdx.main " + HOSTILE,
            "commit": None,
            "started": "2025-01-01T00:00:00",
            "versions": {"jax": "0.10.2"},
            "device": "CPU",
            "params": 12_300_000,
            "tokens": 64,
        },
    )
    (root / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(range(200))))
    for step in range(0, 200, 20):
        folder = root / f"samples/{step:08d}"
        dump(
            folder / "samples.json",
            [
                {"file": "00.mp4", "prompt": HOSTILE, "seed": 7},
                {"file": "a #1.mp4", "prompt": "a red ring", "seed": 8},
            ],
        )
        (folder / "00.mp4").touch()
        (folder / "a #1.mp4").touch()
    examples = [
        {
            "file": f"eval/{i:03d}.mp4",
            "prompt": HOSTILE,
            "ok": i > 0,
            "truth": {"colour": "red"},
            "read": {"colour": "red" if i else "<b>blue"},
        }
        for i in range(40)
    ]
    for example in examples:
        (root / example["file"]).parent.mkdir(exist_ok=True)
        (root / example["file"]).touch()
    scores = {"colour": 0.975, "all": 0.9}
    following = {
        "step": 190,
        "sampler": "heun",
        "steps": 20,
        "guidance": 2.0,
        "prompts": 40,
        "scores": scores,
        "chance": dict.fromkeys(scores, 0.1),
        "true_renders": dict.fromkeys(scores, 1.0),
        "examples": examples,
        "confusion": {"colour": {"red": {"red": 39, HOSTILE: 1}}},
    }
    depth = {
        "signal": "depth",
        "measure": "position error",
        "unit": "px",
        "model": 0.5,
        "without": 3.0,
        "shuffled": None,
        "true": 0.1,
        "goal": 1.0,
        "reached": True,
    }
    steady = {"step": 200, "clips": 8, "motion": 9.0, "conclusive": 1.0}
    dump(
        root / "eval.json",
        {
            "prompt_following": following,
            "control": {"step": 190, "clips": 4, "signals": [depth]},
            "flicker": {**steady, "flicker": 0.4, "true": {"flicker": 0.2, "motion": 10.0}},
            "identity_drift": {**steady, "drift": None, "true": {"drift": 0.02}},
        },
    )
    (root / "bad_records.jsonl").write_text(
        "".join(json.dumps({"key": f"clip{i}", "reason": HOSTILE}) + "\n" for i in range(30))
    )
    return root


def figures(page):
    found = re.findall(r'<script type="application/json">(.*?)</script>', page)
    return [json.loads(figure) for figure in found]


def curve(page, name):
    """The points of the last trace of that name: {step: value}."""
    trace = [t for f in figures(page) for t in f["data"] if t.get("name") == name][-1]
    return dict(zip(trace["x"], trace["y"], strict=True))


def references(page):
    return re.findall(r'<[a-z][^<>]*?\s(?:src|href)="?([^"\s>]*)', page)


def test_page_of_a_whole_run(workdir):
    page = write_report(workdir).read_text()
    assert all(f'<section id="{name}">' in page for name in SECTIONS)
    assert "<h1>tiny run</h1>" in page and "Not yet" not in page and "not yet" not in page
    assert "Cannot be shown" not in page
    for number in ("90.0%", "0.5", "100.0", "25.0%", "0.111", "12.3 M"):
        assert f"<b>{number}</b>" in page
    assert "30 skipped. The first 20" in page and "clip19<" in page and "clip20<" not in page
    assert len(figures(page)) == 10  # loss, 3 by time, 2 + 2, bars, a confusion
    assert all(
        axis["title"]["text"]
        for f in figures(page)
        for axis in (f["layout"]["xaxis"], f["layout"]["yaxis"])
    )


def test_everything_referenced_is_in_the_workdir(workdir):
    page = write_report(workdir).read_text()
    files = [unquote(r) for r in references(page) if not r.startswith("#")]
    assert len(files) == 1 + 2 * 6 + 40
    assert all((workdir / file).is_file() and not file.startswith("/") for file in files)
    assert {r[1:] for r in references(page) if r.startswith("#")} == set(SECTIONS)
    assert not re.search(
        r"(src|href|url)\s*[=(]\s*[\"']?\s*(https?:)?//",
        page.replace("&lt;img src=https://evil", ""),
    )
    assert (workdir / "report/plotly.min.js").stat().st_size > 1e6


def test_text_from_files_is_escaped(workdir):
    page = write_report(workdir).read_text()
    assert "alert" in page and "<script>alert" not in page and "<img" not in page
    assert "✗ colour: &lt;b&gt;blue" in page
    figures(page)  # the hostile label of the confusion does not end its script element


def test_files_outside_the_workdir_are_not_shown(workdir):
    (workdir.parent / "secret.mp4").touch()
    dump(
        workdir / "samples/00000300/samples.json",
        [
            {"file": name, "prompt": "p", "seed": i}
            for i, name in enumerate(["../../../secret.mp4", "missing.mp4", "//evil.example/a.mp4"])
        ],
    )
    page = write_report(workdir).read_text()
    assert "secret" not in page and "missing" not in page and "evil.example/a.mp4" not in page


class Tags(HTMLParser):
    """What a browser would make of a page: {(tag, its attributes)}, and the files it names."""

    def __init__(self, page):
        super().__init__()
        self.kinds, self.files = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.kinds.add((tag, tuple(sorted(name for name, _ in attributes))))
        self.files += [value for name, value in attributes if name in ("src", "href")]


FILES = [
    "../secret.mp4",
    "/etc/passwd",
    "javascript:alert(1)",
    "//evil.example/a.mp4",
    "link.mp4",
    "https://evil.example/a.mp4",
    "x" * 9999,
    "a\0b.mp4",
    "\ud800",
    "linked/a.mp4",
    7,
    None,
    '" onerror="alert(1)',
    ["a"],
    {"a": 1},
    "../tiny run/eval/000.mp4",
    "eval/000.mp4",
]
VALUES = [
    HOSTILE,
    {"all": HOSTILE},
    [HOSTILE],
    {HOSTILE: HOSTILE},
    {HOSTILE: {HOSTILE: HOSTILE}},
    {"a": {"b": {"c": "<a href='https://evil.example'>"}}},
    10**400,
    None,
    [[[1]]],
    "\ud800",
]


@pytest.fixture
def harmless(workdir):
    """harmless(): writes the page of a workdir with links out of it, and finds in it no tag or
    attribute that other pages have not, no script, and no file outside."""
    dump(workdir.parent / "empty/config.json", {})
    known = set.union(
        *(Tags(write_report(run).read_text()).kinds for run in (workdir, workdir.parent / "empty"))
    )
    dump(workdir.parent / "outside/a.mp4", 0)
    dump(workdir.parent / "secret.mp4", 0)
    (workdir / "link.mp4").symlink_to(workdir.parent / "secret.mp4")
    (workdir / "linked").symlink_to(workdir.parent / "outside")
    (workdir / "javascript:alert(1)").touch()

    def check():
        page = write_report(workdir).read_text()
        tags = Tags(page)
        assert tags.kinds <= known and HOSTILE not in page
        assert not re.search("<(a|img|script|b)", json.dumps(figures(page)))  # plotly's own markup
        for file in tags.files:
            assert not re.match("[a-z]+:|/", file, re.IGNORECASE), file
            there = (workdir / unquote(file)).resolve()
            assert file[0] == "#" or (
                there.is_relative_to(workdir) and there.is_file() and ".." not in file
            )
        return page, tags.files

    return check


def test_hostile_names_and_texts_are_shown_as_text(workdir, harmless):
    result = json.loads((workdir / "eval.json").read_text())
    scores = {HOSTILE: 0.5, "all": 0.5}
    following = {
        **result["prompt_following"],
        "sampler": HOSTILE,
        "step": HOSTILE,
        "scores": scores,
        "chance": scores,
        "true_renders": scores,
        "confusion": {HOSTILE: {HOSTILE: {HOSTILE: 3}}},
        "examples": [
            {"file": name, "prompt": HOSTILE, "truth": {HOSTILE: HOSTILE}, "read": {}}
            for name in FILES
        ],
    }
    control = {"signals": [{"signal": HOSTILE, "measure": HOSTILE, "unit": HOSTILE, "goal": 1.0}]}
    dump(
        workdir / "eval.json",
        {**result, "prompt_following": following, "control": control, HOSTILE: {HOSTILE: 1}},
    )
    dump(
        workdir / "samples/00000180/samples.json",
        [{"file": f"../../{name}", "prompt": HOSTILE, "seed": HOSTILE} for name in FILES],
    )
    dump(workdir / "samples/²/samples.json", [{"file": "f", "prompt": "p", "seed": 1}])
    page, files = harmless()
    assert "Cannot be shown" not in page and page.count("–</div>") >= len(FILES) - 2
    assert [f for f in files if f.startswith(("eval", "java"))] == [
        "javascript%3Aalert%281%29",
        "eval/000.mp4",
    ]


def variants(row, value):
    """Return the row with another value at each of its places in turn."""
    return [{**row, key: value} for key in row]


@pytest.mark.parametrize(
    "value",
    [pytest.param(v, marks=[] if i % 2 == 0 else [pytest.mark.slow]) for i, v in enumerate(VALUES)],
    ids=lambda v: str(v)[:20],
)
def test_values_of_another_kind_stop_no_run(workdir, harmless, value):
    # A short page: charts, samples and examples are slow. Curves are tested at the end.
    (workdir / "metrics.jsonl").unlink()
    for folder in (workdir / "samples").iterdir():
        (folder / "samples.json").unlink()
    result = json.loads((workdir / "eval.json").read_text())
    following, control = result["prompt_following"], result["control"]
    following["examples"] = following["examples"][:2]
    dump(workdir / "eval.json", dict.fromkeys(result, value))
    harmless()

    # Sections do not depend on one another: the i-th variants of all at once.
    rows = {name: variants(row, value) for name, row in result.items()}
    example = {"truth": {"a": "b"}, "read": {}, "prompt": "p", "file": "f"}
    rows["prompt_following"] += [
        {**following, "examples": [one]} for one in variants(example, value)
    ]
    (signal,) = control["signals"]
    rows["control"] += [{"signals": [one]} for one in variants(signal, value)]
    samples = variants({"prompt": "p", "seed": 1, "file": "f"}, value)
    for i in range(max(map(len, rows.values()))):
        dump(workdir / "eval.json", {name: row[i % len(row)] for name, row in rows.items()})
        dump(workdir / "samples/00000180/samples.json", [samples[i % len(samples)]])
        harmless()

    dump(workdir / "metrics.jsonl", {"step": 1, "train/loss": value, HOSTILE: value})
    dump(workdir / "bad_records.jsonl", {"key": value, "reason": value, "position": value})
    for name in ("run.json", "samples/00000000/samples.json", "eval.json"):
        dump(workdir / name, value)
    harmless()


def test_a_chart_cannot_end_its_script():
    assert chart("", [go.Scatter(name=HOSTILE)], "y").count("</script>") == 1


def test_a_script_of_somebody_else_is_replaced(workdir):
    script = write_report(workdir).parent / "report/plotly.min.js"
    ours = script.read_bytes()
    script.write_bytes(b"alert(1);" + ours[9:])  # as long
    write_report(workdir)
    assert script.read_bytes() == ours


def test_json_that_is_too_deep_is_left_out(workdir):
    (workdir / "eval.json").write_text("[" * 100_000)
    (workdir / "metrics.jsonl").write_text("[" * 100_000 + "\n")
    assert "Not yet" in write_report(workdir).read_text()


def test_bad_records_of_all_hosts_are_listed_once(workdir):
    for host, name in enumerate(["bad_records.jsonl", "bad_records_1.jsonl"]):
        rows = [
            {
                "position": 10 * k + host,
                "attempt": 0,
                "key": f"clip {k} of {host}",
                "reason": "planted",
            }
            for k in (2, 1, 2)
        ]  # a resumed run repeats some
        (workdir / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"pos')
    page = write_report(workdir).read_text()
    assert "4 skipped" in page
    assert re.findall("clip . of .", page) == [
        "clip 1 of 0",
        "clip 1 of 1",
        "clip 2 of 0",
        "clip 2 of 1",
    ]


def test_the_sample_grid_takes_the_first_the_last_and_steps_between(workdir):
    page = write_report(workdir).read_text()
    steps = [int(s) for s in re.findall(r"<th>step ([\d,]+)</th>", page)]
    assert steps[0] == 0 and steps[-1] == 180 and len(steps) == 6 and steps == sorted(steps)


def test_what_is_not_there_is_not_yet(tmp_path):
    dump(tmp_path / "config.json", {"eval": {name: {} for name in EVALUATORS}})
    page = write_report(tmp_path).read_text()
    assert all(f'<section id="{name}">' in page for name in SECTIONS)
    assert page.count("Not yet") == 9 and page.count("not yet") == 6 and not figures(page)


@pytest.mark.parametrize("section", [{}, None, {"flicker": None}, [HOSTILE], HOSTILE, 7])
def test_rows_that_are_off_have_no_section(tmp_path, section):
    dump(tmp_path / "config.json", {"eval": section})
    page = write_report(tmp_path).read_text()
    found = re.findall(r'<section id="(\w+)">', page)
    assert found == [name for name in SECTIONS if name == "loss" or name not in EVALUATORS]


@pytest.mark.parametrize("gone", ["run.json", "eval.json", "metrics.jsonl", "bad_records.jsonl"])
@pytest.mark.parametrize("half", [False, True])
def test_any_piece_may_be_missing_or_half_written(workdir, gone, half):
    if half:
        (workdir / gone).write_text('{"step": 3, "x')
    else:
        (workdir / gone).unlink()
    assert "</html>" in write_report(workdir).read_text()


def test_a_workdir_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        write_report(tmp_path)


def test_resumed_and_killed_run(workdir):
    """Repeated steps take the later value, a half-written last line is left out."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows([150, 151], loss=302.0))
        file.write('{"step": 200, "train/lo')
    page = write_report(workdir).read_text()
    raw = next(t for f in figures(page) for t in f["data"] if t.get("name") == "training")
    assert raw["x"] == list(range(200))
    assert raw["y"][150] == pytest.approx(2.0) and raw["y"][149] == pytest.approx(1 / 150, 1e-3)
    assert raw["y"][151] == pytest.approx(302 / 152, 1e-3)
    # The training row of step 0 did not displace its evaluation row, nor the other way round.
    assert curve(page, "validation, captions dropped")[0] == 0.6


def test_smoothing_keeps_a_constant_and_skips_what_is_not_finite(workdir):
    lines = [{"step": i, "train/loss": float("nan") if i == 500 else 3.0} for i in range(4000)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    points = curve(write_report(workdir).read_text(), "training")
    assert len(points) < 2000 and max(points) == 3999
    assert {y for x, y in points.items() if x != 500} == {3.0}


def test_same_workdir_same_page_and_nothing_left_behind(workdir):
    first = write_report(workdir).read_bytes()
    script = (workdir / "report/plotly.min.js").stat().st_mtime_ns
    start = time.perf_counter()
    assert write_report(workdir).read_bytes() == first
    assert time.perf_counter() - start < 2.0
    assert (workdir / "report/plotly.min.js").stat().st_mtime_ns == script
    assert not [p for p in workdir.rglob(".*")]
