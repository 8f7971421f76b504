"""A workdir that continues with another config: what is said, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.train.config_changes import FREE, check_config, config_changes

CONFIG = resolve(str(Path(__file__).parents[2] / "configs" / "t2v_tiny.py"), [])
FLAT = flatten_dict(CONFIG, keep_empty_nodes=True, sep=".")
KEYS = sorted(key for key, value in FLAT.items() if value is not empty_node)


def changed(**keys) -> dict:
    """Return the config with other values of dotted keys."""
    return unflatten_dict({**FLAT, **keys}, sep=".")


@pytest.fixture
def workdir(tmp_path):
    """Return a workdir that was trained with CONFIG and has a checkpoint."""
    (tmp_path / "checkpoints" / "500").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_the_same_config_has_no_changes(workdir):
    assert config_changes(CONFIG, CONFIG) == []
    assert check_config(workdir, copy.deepcopy(CONFIG), allow=False) == []


@pytest.mark.parametrize("key", KEYS)
def test_any_key_that_differs_is_found(workdir, key):
    """And refused exactly if it decides what is learned."""
    new = changed(**{key: "other"})
    (change,) = [c for c in config_changes(CONFIG, new) if c.key == key]
    assert change.new == "other" and key in str(change)

    is_free = key != "train.ema" and any(f"{key}.".startswith(f"{name}.") for name in FREE)
    if is_free:
        assert change in check_config(workdir, new, allow=False)
        return
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"config\.{key}: .* -> \"other\""):
        check_config(workdir, new, allow=False)
    assert change in check_config(workdir, new, allow=True)
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("optim.b2", 0.99),
        ("model.backbone.mlp_ratio", None),
        ("model.signals.fps.dropout", 0.1),
        ("process.prediction", "x0"),
        ("data.loader.shuffle", True),
        ("first_frame", 0.0),
    ],
)
def test_a_default_that_is_written_out_is_no_change(key, default):
    assert config_changes(CONFIG, changed(**{key: default})) == []


def test_a_key_that_is_left_out_has_its_default():
    old = changed(**{"optim.b1": 0.5})
    (change,) = config_changes(old, CONFIG)
    assert str(change) == "config.optim.b1: 0.5 -> 0.9"


def test_without_a_checkpoint_nothing_was_learned(workdir):
    (workdir / "checkpoints" / "500").rmdir()
    assert check_config(workdir, changed(seed=1), allow=False)
    (workdir / "config.json").unlink()
    assert check_config(workdir, changed(seed=1), allow=False) == []
