"""Keys of before: each is answered with its new name, all at once, wherever it stands."""

import pytest

from vdx.config.build import ConfigError
from vdx.config.loader import resolve
from vdx.config.renamed import RENAMED_KEYS, check_renamed_keys
from vdx.experiment import load
from vdx.files import write_json


def nested(path, value=1):
    """The config that has one key."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_every_old_key_is_answered_with_the_new_one(old):
    with pytest.raises(ConfigError, match=f"config.{old} is now config.{RENAMED_KEYS[old]}$"):
        check_renamed_keys(nested(old))


def test_all_of_them_are_listed_at_once():
    config = {"sample": {"reuse": 0.1, "steps": 3}, "time": {"name": "uniform"}}
    with pytest.raises(ConfigError) as error:
        check_renamed_keys(config, source="runs/old/config.json")
    assert "sample.reuse" in str(error.value) and "config.time is now" in str(error.value)
    assert "runs/old/config.json" in str(error.value)


@pytest.mark.parametrize("new", RENAMED_KEYS.values())
def test_new_keys_pass(new):
    check_renamed_keys(nested(new))


def test_the_command_line_is_answered_too(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(variant=''):\n    return ConfigDict({'sample': {'steps': 2}})\n"
    )
    with pytest.raises(ConfigError, match=r"config\.sample\.reuse is now config\.sample\.cache_"):
        resolve(str(path), ["--config.sample.reuse=0.1"])


def test_a_workdir_of_before_is_answered_too(tmp_path):
    write_json(tmp_path / "config.json", {"train": {"steps": 1, "spike": 3.0}})
    with pytest.raises(ConfigError, match=r"config\.json.*\n.*train\.spike is now"):
        load(tmp_path)
