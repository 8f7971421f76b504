"""Configs: the command line over the file, and every shipped config, whole and with typos."""

import copy
import json
from pathlib import Path

import pytest

from vdx.config.build import ConfigError
from vdx.config.loader import is_override, parse_value, resolve
from vdx.evaluation.table import make_rows
from vdx.experiment import Experiment
from vdx.models.denoiser import Denoiser

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(str(p) for p in FOLDER.glob("*.py") if p.stem != "prepare")  # of experiments
SMALL = """
from ml_collections import ConfigDict

def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict({
        "seed": 0, "data": {"path": "", "levels": (1, 2)}, "model": {"width": 4},
        "section": None, "variant": variant})
    config.data.source = ConfigDict({"path": config.data.get_ref("path")})
    return config
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return str(path)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("3", 3),
        ("3.5", 3.5),
        ("1e-4", 1e-4),
        ("-1", -1),
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("(1, 2)", (1, 2)),
        ("['a']", ["a"]),
        ("red ball", "red ball"),
        ("a=b", "a=b"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("", ""),
        ("(1, 2", "(1, 2"),
        ("'3'", "3"),
        ("{'a': 1}", {"a": 1}),
        ("none", "none"),  # a row of several tables: --config.model.backbone.remat=none
    ],
)
def test_values_on_the_command_line(text, want):
    got = parse_value(text)
    assert got == want and type(got) is type(want)


def test_overrides_reach_keys_that_the_file_has_and_has_not(small):
    got = resolve(
        small,
        [
            "--config.seed=7",
            "--config.model.depth=3",
            "--other=1",
            "-config.section.new.deep=x",
            "--config.model.width=1.5",
        ],
    )
    assert got["seed"] == 7 and got["model"] == {"width": 1.5, "depth": 3}
    assert got["section"] == {"new": {"deep": "x"}}
    assert got["data"]["levels"] == [1, 2]  # plain JSON values


def test_references_follow(small):
    assert resolve(small, ["--config.data.path=/clips"])["data"]["source"]["path"] == "/clips"
    got = resolve(small, ["--config.data.source.path=/other"])["data"]
    assert got["source"]["path"] == "/other"


def test_the_variant_is_given_to_the_file(small):
    assert resolve(small + ":large", [])["variant"] == "large"
    assert resolve(small, [])["variant"] == ""


def test_what_cannot_be_meant(small, tmp_path):
    with pytest.raises(ConfigError, match=r"No config file 'configs/no.py'"):
        resolve("configs/no.py", [])
    with pytest.raises(ConfigError, match=r"Write --config.seed=VALUE"):
        resolve(small, ["--config.seed"])
    with pytest.raises(ConfigError, match="'seed' is a value, not a section"):
        resolve(small, ["--config.seed.x=1"])
    text = tmp_path / "config.txt"
    text.write_text("")
    with pytest.raises(ConfigError, match="is not a Python file"):
        resolve(str(text), [])


def test_missing_file_lists_those_that_are_there(at_root):
    with pytest.raises(ConfigError, match=r"configs/t2v_base\.py.*configs/t2v_tiny\.py"):
        resolve("configs/t2v_tny.py", [])


@pytest.mark.parametrize(
    ("arg", "is_one"),
    [
        ("--config.a=1", True),
        ("-config.a=1", True),
        ("--config=x", False),
        ("config.a=1", False),
        ("--configs.a=1", False),
    ],
)
def test_overrides_are_told_from_flags(arg, is_one):
    assert is_override(arg) is is_one


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: Path(p).stem)
def test_every_config_is_an_experiment(path):
    experiment = Experiment(resolve(path, []))
    assert experiment.shapes and experiment.tx
    again = Experiment(json.loads(json.dumps(experiment.config)))  # as the workdir keeps it
    assert again.model == experiment.model and again.optimizer == experiment.optimizer


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda p: Path(p).stem)
def config(request):
    return resolve(request.param, [])


# Where a typo is planted, what is written there, and what the message must suggest.
TYPOS = [
    ("modle", {}, "model"),
    ("seeed", 1, "seed"),
    ("data.heigth", 32, "height"),
    ("data.clip.num_frame", [8], "num_frames"),
    ("model.backbon", {}, "backbone"),
    ("model.backbone.widht", 8, "width"),
    ("model.backbone.name", "transfomer", "transformer"),
    ("model.backbone.remat", "ful", "full"),
    ("model.backbone.pattern", "factorised", "factorized"),
    ("model.backbone.pattern", ["spase"], "space"),
    ("model.backbone.size", "tinny", "tiny"),
    ("model.signals.fpss", {}, "fps"),
    ("model.signals.fps.drop_out", 0.1, "dropout"),
    ("process.predicton", "x0", "prediction"),
    ("process.name", "rectified_flo", "rectified_flow"),
    ("time_sampler.shfit", 3.0, "shift"),
    ("loss.denoising.weighting.name", "min_snrr", "min_snr"),
    ("loss.denoisin", {}, "denoising"),
    ("optim.learning_rat", 1e-3, "learning_rate"),
    ("mesh.tensr", 2, "tensor"),
    ("train.stepz", 3, "steps"),
    ("sample.guidence", 3.0, "guidance"),
    ("sample.sampler", "unipcc", "unipc"),
    ("eval.prompt_folowing", {}, "prompt_following"),
    ("eval.loss.evry", 3, "every"),
]


# The same in the fields that a U-Net has instead.
OF_UNETS = {
    "widht": ("widhts", (8,), "widths"),
    "pattern": ("temporal", "motoin", "motion"),
    "size": ("control", "imag", "image"),
}


@pytest.mark.parametrize(("key", "value", "nearest"), TYPOS, ids=lambda v: str(v)[:24])
def test_a_typo_anywhere_names_what_was_meant(config, key, value, nearest):
    config, (*sections, last) = copy.deepcopy(config), key.split(".")
    if sections[-1:] == ["clip"] and "clip" not in config["data"]:
        config["data"]["clip"] = {"num_frames": [8]}
    if config["model"]["backbone"]["name"] == "unet" and sections == ["model", "backbone"]:
        last, value, nearest = OF_UNETS.get(last, (last, value, nearest))
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    with pytest.raises(ConfigError, match=rf"Did you mean '{nearest}'\?"):
        make_rows(Experiment(config).eval)


def test_equal_models_are_traced_once(at_root, monkeypatch):
    traces = []
    new_params = Denoiser.new_params
    monkeypatch.setattr(
        Denoiser, "new_params", lambda self, key: traces.append(1) or new_params(self, key)
    )
    tiny = [f"--config.model.backbone.{field}" for field in ("width=24", "depth=1", "heads=3")]
    config = resolve("configs/t2v_tiny.py", tiny)
    first, again = Experiment(config), Experiment(copy.deepcopy(config))
    assert first.shapes == again.shapes and len(traces) == 1
    # 24.0 equals 24, and is refused all the same.
    config["model"]["backbone"]["width"] = 24.0
    with pytest.raises(ConfigError, match=r"width = 24\.0"):
        Experiment(config)
