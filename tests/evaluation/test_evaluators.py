"""Every row of EVALUATORS: scores of a small random model, needs, the report, planted faults."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.data.scenes.world import COLOURS
from vdx.evaluation.drawing import ClipDrawer
from vdx.evaluation.evaluator import NEEDS, EvaluationContext
from vdx.evaluation.loss_at_times import LossAtTimes
from vdx.evaluation.report import write_report
from vdx.evaluation.run import evaluate_run, format_scores, periodic_tasks, rows_at_end
from vdx.evaluation.table import EVALUATORS, make_evaluators, make_rows
from vdx.experiment import Experiment
from vdx.files import read_json, write_json
from vdx.generate.run_pipeline import RunPipeline
from vdx.generate.video_io import NotFinite, write_video
from vdx.metrics.tracking import foreground

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("at_root")

SMALL = [
    "--config.data.loader.global_batch=4",
    "--config.data.mean=-0.8",
    "--config.model.backbone.width=32",
    "--config.model.backbone.depth=1",
    "--config.model.backbone.heads=2",
    "--config.sample.steps=2",
    "--config.sample.batch=4",
]
ROWS = {
    "loss": {"clips": 4, "times": [0.2, 0.8]},
    "prompt_following": {"prompts": 4},
    "control": {"clips": 4},
    "flicker": {"clips": 4},  # as many as the others draw at once, so that programs are shared
    "identity_drift": {"clips": 4},
}
# The keys that each row documents.
KEYS = {
    "loss": {
        f"{split}/{key}"
        for split in ("validation", "train_eval")
        for key in ("loss", "loss_null", "loss_t0.2", "loss_t0.8")
    },
    "prompt_following": {
        "prompts",
        "sampler",
        "steps",
        "guidance",
        "scores",
        "chance",
        "true_renders",
        "confusion",
        "examples",
    },
    "control": {"clips", "signals"},
    "flicker": {"clips", "flicker", "motion", "conclusive", "true"},
    "identity_drift": {"clips", "drift", "motion", "conclusive", "true"},
}


def small(*more, config="configs/control_tiny.py:depth"):
    return Experiment(resolve(config, [*SMALL, *more]))


def numbers(value):
    """Yield every number in JSON values."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture(scope="module")
def run(tmp_path_factory, mesh, randomise):
    """(experiment, parameters, workdir, result) of all rows on one small random model."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.chdir(ROOT)
    experiment = small(f"--config.eval={ROWS}")
    monkeypatch.undo()
    workdir = tmp_path_factory.mktemp("run")
    write_json(workdir / "config.json", experiment.config)
    with jax.set_mesh(mesh):
        params = jax.tree.map(jnp.asarray, randomise(experiment.shapes))
        result = evaluate_run(experiment, params, workdir, 7)
    return experiment, params, workdir, result


def test_every_row_is_in_these_tests():
    assert list(EVALUATORS) == list(ROWS) == list(KEYS)


@pytest.mark.parametrize("name", EVALUATORS)
def test_scores_are_documented_and_finite(run, name):
    _, _, workdir, result = run
    scores = result[name]
    assert set(scores) == {"step", *KEYS[name]} and scores["step"] == 7
    documented = EVALUATORS[name].__doc__
    assert all(
        f"`{key}`" in documented for key in KEYS[name] if "_t0" not in key and "/" not in key
    )
    # NaN is for readings that are not possible, which the share of conclusive clips admits.
    if scores.get("conclusive", 1) == 1 and name != "control":
        assert all(math.isfinite(value) for value in numbers(scores))
    assert set(read_json(workdir / "eval.json")[name]) == set(scores)


@pytest.mark.parametrize("name", EVALUATORS)
def test_logged_numbers_are_flat(run, name):
    logged = EVALUATORS[name]().logged(run[3][name])
    assert logged and all(isinstance(value, float | int) for value in logged.values())
    assert all(key.isascii() and " " not in key for key in logged)


@pytest.mark.parametrize("name", EVALUATORS)
def test_the_report_has_its_section(run, name):
    _, _, workdir, result = run
    row = EVALUATORS[name]()
    page = write_report(workdir).read_text()
    assert f'<section id="{name}">\n<h2>{row.title}</h2>' in page
    assert row.section({}, workdir, {}) == ""
    logged = {7: row.logged(result[name])}
    assert "<t" in (html := row.section(result[name], workdir, logged)) or "chart" in html
    assert "Cannot be shown" not in page


def test_eval_json_is_json_and_the_text_names_every_row(run):
    experiment, _, workdir, result = run
    refuse = lambda constant: pytest.fail(f"{constant} is not JSON")
    json.loads((workdir / "eval.json").read_text(), parse_constant=refuse)
    text = format_scores(experiment, result)
    for word in (
        "validation prompts",
        "shuffled",
        "flicker, 4 clips",
        "train_eval",
        "motion score",
    ):
        assert word in text
    assert len(list((workdir / "eval").glob("*.mp4"))) == 4
    assert (workdir / "eval" / "sample_grid.webp").is_file()


def test_control_is_compared_with_clips_without_the_signal(run):
    rows = run[3]["control"]["signals"]
    assert {row["signal"] for row in rows} == {"depth"} and len(rows) == 2
    assert all({"model", "without", "shuffled", "true", "goal"} <= set(row) for row in rows)
    assert rows[0]["true"] < 0.1


@pytest.fixture
def noise_is_drawn(monkeypatch):
    """Noise in place of the clips of a network, which the fixture `run` draws."""
    rng = np.random.default_rng(0)
    shape = (8, 32, 32, 3)
    monkeypatch.setattr(
        ClipDrawer,
        "draw",
        lambda self, params, prompts, **_: rng.integers(0, 256, (len(prompts), *shape), np.uint8),
    )


def test_rows_are_chosen_and_others_stay(run, tmp_path, mesh, noise_is_drawn):
    experiment, params, _, _ = run
    write_json(tmp_path / "eval.json", {"loss": {"step": 3}})
    with jax.set_mesh(mesh):
        result = evaluate_run(experiment, params, tmp_path, 9, ["flicker"])
        assert list(result) == ["flicker"]
        with pytest.raises(ConfigError, match=r"unknown name 'flick'\. Did you mean 'flicker'"):
            evaluate_run(experiment, params, tmp_path, 9, ["flick"])
    found = read_json(tmp_path / "eval.json")
    assert found["loss"]["step"] == 3 and found["flicker"]["step"] == 9


def test_rows_that_run_while_training_are_tasks(run, tmp_path, mesh):
    _, params, _, result = run
    rows = {"loss": {**ROWS["loss"], "every": 5}, "flicker": {"clips": 2}}
    experiment = small(f"--config.eval={rows}")
    assert rows_at_end(experiment) == ["flicker"]
    with jax.set_mesh(mesh):
        (task,) = periodic_tasks(experiment, tmp_path, mesh)
        logged = task.run(5, params)
        again = task.run(10, params)
    assert (task.name, task.every) == ("loss", 5)
    assert logged == again == {k: v for k, v in result["loss"].items() if k != "step"}
    assert read_json(tmp_path / "eval.json")["loss"]["step"] == 10


# Needs --------------------------------------------------------------------------------------


def folder_experiment(path, rows):
    more = [f"--config.data.path={path}", f"--config.eval={rows}"]
    return small(*more, "--config.model.backbone.depth=1", config="configs/t2v_folder.py")


@pytest.mark.parametrize("name", EVALUATORS)
def test_a_row_refuses_data_that_it_cannot_evaluate(name):
    needs = EVALUATORS[name].needs
    assert set(needs) <= set(NEEDS)
    rows = {"loss": None, name: ROWS[name]}
    if "truth" in needs:
        with pytest.raises(ConfigError, match=rf"config\.eval\.{name} needs data whose truth") as e:
            make_evaluators(folder_experiment("clips", rows))
        assert "'folder'" in str(e.value)
        assert "rows that work for this run: loss, flicker, identity_drift" in str(e.value)
    else:
        assert list(make_evaluators(folder_experiment("clips", rows))) == [name]
    latents = Experiment(resolve("configs/t2v_base.py:smoke", [f"--config.eval={rows}"]))
    if "clips" in needs:
        with pytest.raises(ConfigError, match=rf"config\.eval\.{name} needs .*as pixels"):
            make_evaluators(latents)
    else:
        assert list(make_evaluators(latents)) == [name]


def test_footage_is_evaluated_without_truth(tmp_path, mesh, noise_is_drawn):
    """Clips in a folder: their flicker is measured, and their subject is not guessed."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (12, 32, 40, 3)).astype(np.uint8)
    for i in range(12):
        write_video(tmp_path / f"{i}.mp4", np.roll(noise, i, 2), 8.0)
        (tmp_path / f"{i}.txt").write_text(f"noise {i}")
    rows = {"loss": None, "flicker": {"clips": 2}, "identity_drift": {"clips": 2}}
    experiment = folder_experiment(tmp_path, rows)
    with jax.set_mesh(mesh):
        result = evaluate_run(experiment, {}, tmp_path / "run", 1)
    assert result["flicker"]["clips"] >= 1 and result["flicker"]["true"]["motion"] > 0
    drift = result["identity_drift"]
    assert drift["true"]["conclusive"] == 0 and math.isnan(drift["true"]["drift"])
    assert read_json(tmp_path / "run" / "eval.json")["identity_drift"]["true"]["drift"] is None


# Settings -----------------------------------------------------------------------------------


def test_the_loss_runs_unless_it_is_turned_off():
    assert list(make_rows({})) == ["loss"] and make_rows({})["loss"].every == 500
    assert list(make_rows({"flicker": {}})) == ["loss", "flicker"]
    assert make_rows({"loss": None, "flicker": None}) == {}
    assert make_rows({"loss": {"times": [0.5]}})["loss"].times == (0.5,)


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"prompts": 3}, r"config\.eval: unknown name 'prompts'.*Known: loss, prompt_following"),
        ({"flicker": 3}, r"config\.eval\.flicker = 3: give the settings of the row"),
        (
            {"flicker": {"clip": 3}},
            r"Unknown key config\.eval\.flicker\.clip\. Did you mean 'clips'",
        ),
        ({"flicker": {"clips": 0}}, r"eval\.flicker\.clips = 0 is out of range, expected int >= 1"),
        (
            {"prompt_following": {"prompts": -1}},
            r"eval\.prompt_following\.prompts = -1 is out of range, expected int >= 1",
        ),
        ({"loss": {"every": -1}}, r"eval\.loss\.every = -1 is out of range, expected int >= 0"),
        ({"loss": {"times": []}}, r"eval\.loss\.times is empty: give one or more times"),
        (
            {"loss": {"times": [1.5]}},
            r"eval\.loss\.times = 1\.5 is out of range, expected float in \[0, 1\]",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_rows(spec)


@pytest.mark.parametrize("every, saves, fine", [(5, 10, True), (10, 5, False), (0, 5, False)])
def test_the_best_metric_is_measured_at_every_save(every, saves, fine):
    experiment = small(
        f"--config.eval={{'loss': {{'every': {every}}}}}",
        f"--config.train.save_every={saves}",
        "--config.train.best_metric=validation/loss",
    )
    if fine:
        assert make_evaluators(experiment)
    else:
        with pytest.raises(ConfigError, match=rf"save_every = {saves} must be a multiple of"):
            make_evaluators(experiment)


# Planted faults -----------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch, tmp_path, mesh):
    """evaluated(name, fault): scores of a row whose "drawn" clips are true ones with a fault."""

    def score(name, fault):
        experiment = small(
            f"--config.eval={{'loss': None, {name!r}: {{'clips': 6}}}}",
            "--config.data.source.backgrounds=('grey',)",
            "--config.data.source.motions=('left','right','up','down')",
        )

        def draw(self, params, prompts, **_):
            records = self.validation_records(len(prompts))
            assert list(prompts) == [record.caption for record in records]
            return np.stack([fault(self.true_clip(record)) for record in records])

        monkeypatch.setattr(ClipDrawer, "draw", draw)
        context = EvaluationContext(experiment, tmp_path, mesh)
        return make_evaluators(experiment)[name].prepare(context)({})

    return score


def frozen(video):
    return np.repeat(video[:1], len(video), 0)


def unsteady(levels):
    """Return the fault of a brightness that changes by so much from frame to frame."""
    noise = np.random.default_rng(0).standard_normal(8)[:, None, None, None]
    return lambda video: np.clip(video + 0.5 + levels * noise, 0, 255).astype(np.uint8)


def morphing(amount):
    """Return the fault of a subject whose colour becomes white while the clip runs."""

    def fault(video):
        mix = amount * np.linspace(0, 1, len(video))[:, None, None, None]
        mix = mix * foreground(video)[..., None]
        return (video * (1 - mix) + np.array(COLOURS["white"]) * mix).astype(np.uint8)

    return fault


def test_flicker_grows_with_the_brightness_that_is_planted(evaluated):
    calm = evaluated("flicker", lambda video: video)
    assert calm["flicker"] == calm["true"]["flicker"] < 0.6 and calm["conclusive"] == 1.0
    values = [evaluated("flicker", unsteady(levels))["flicker"] for levels in (2, 4, 8)]
    assert 2 * calm["flicker"] < values[0] < values[1] < values[2]


def test_drift_grows_with_the_morph_that_is_planted(evaluated):
    same = evaluated("identity_drift", lambda video: video)
    assert same["drift"] == same["true"]["drift"] < 0.06 and same["conclusive"] == 1.0
    scores = [evaluated("identity_drift", morphing(amount)) for amount in (0.25, 0.5, 1.0)]
    assert all(one["conclusive"] == 1.0 for one in scores)
    values = [one["drift"] for one in scores]
    assert 2 * same["drift"] < values[0] < values[1] < values[2]


@pytest.mark.parametrize("name, key", [("flicker", "flicker"), ("identity_drift", "drift")])
def test_a_frozen_clip_is_recognized_by_its_motion(evaluated, name, key):
    scores = evaluated(name, frozen)
    assert scores[key] <= scores["true"][key]  # it wins, which is why the motion is next to it
    assert scores["motion"] == 0.0 < scores["true"]["motion"]


def test_a_subject_that_cannot_be_found_is_inconclusive(evaluated):
    for fault in (
        np.zeros_like,
        lambda v: np.random.default_rng(0).integers(0, 256, v.shape, np.uint8),
    ):
        scores = evaluated("identity_drift", fault)
        assert math.isnan(scores["drift"]) and scores["conclusive"] == 0.0


@pytest.fixture(params=[math.nan, math.inf, -math.inf])
def second_clip_is_bad(request, monkeypatch):
    """The second of the drawn clips has one bad pixel; nothing is computed."""

    def draw_arrays(self, drawn, controls):
        clips = np.zeros((len(drawn.prompts), 8, 32, 32, 3), np.float32)
        clips[1, -1, -1, -1, -1] = request.param
        return clips

    monkeypatch.setattr(RunPipeline, "draw_arrays", draw_arrays)


def test_a_clip_that_is_not_finite_is_refused_by_name(second_clip_is_bad, mesh):
    drawing = ClipDrawer(small(), mesh)
    with pytest.raises(NotFinite, match=r"^The clip of prompt 'a dog' and seed 10001 has pixels"):
        drawing.draw({}, ["a cat", "a dog"])


def test_refused_clips_end_neither_the_training_nor_the_other_rows(
    second_clip_is_bad, mesh, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(LossAtTimes, "prepare", lambda self, context: lambda params: {"x": 1.0})
    rows = {"flicker": {"clips": 2, "every": 5}, "loss": {"every": 5}}
    experiment = small(f"--config.eval={rows}")
    tasks = periodic_tasks(experiment, tmp_path, mesh)
    scores = {task.name: task.run(5, {}) for task in tasks}
    assert scores == {"flicker": {}, "loss": {"x": 1.0}}
    assert "No scores of flicker at step 5: The clip of prompt" in caplog.text

    with jax.set_mesh(mesh), pytest.raises(NotFinite, match=r"No scores of .*flicker: The clip"):
        evaluate_run(experiment, {}, tmp_path, 6)
    assert read_json(tmp_path / "eval.json") == {"loss": {"step": 6, "x": 1.0}}
