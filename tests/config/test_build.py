"""Specs to objects: what is right arrives converted, what is wrong is named with a way out."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import pytest

from vdx.config.build import ConfigError, build, fill, lookup


@dataclasses.dataclass(frozen=True)
class Thing:
    steps: int
    rate: float = 0.5
    levels: tuple[float, ...] = ()
    patch: tuple[int, int, int] = (1, 2, 2)
    name_of: str | tuple[str, ...] = "x"
    extra: Mapping[str, Any] | None = None
    on: bool = False
    constant: ClassVar[int] = 3


class Layer(nn.Module):
    width: int
    heads: int = 2


TABLE = {"thing": Thing, "layer": Layer}


@pytest.mark.parametrize(
    ("key", "given", "want"),
    [
        ("rate", 2, 2.0),  # int to float
        ("levels", [1, 0.5], (1.0, 0.5)),  # list to tuple, its entries too
        ("levels", (), ()),
        ("patch", [4, 8, 8], (4, 8, 8)),
        ("name_of", "space", "space"),
        ("name_of", ["space", "time"], ("space", "time")),
        ("extra", None, None),
        ("extra", {"a": {"b": 1}}, {"a": {"b": 1}}),
        ("on", True, True),
    ],
)
def test_right_values_arrive(key, given, want):
    got = getattr(fill(Thing, {"steps": 1, key: given}, "config.t"), key)
    assert got == want and type(got) is type(want)
    if isinstance(want, tuple):
        assert [type(v) for v in got] == [type(v) for v in want]


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("steps", 1.0),
        ("steps", "1"),
        ("steps", True),
        ("steps", None),
        ("rate", "fast"),
        ("rate", True),
        ("levels", 0.5),
        ("levels", [0.5, "x"]),
        ("patch", [1, 2]),
        ("patch", [1, 2, 2.5]),
        ("name_of", 3),
        ("extra", "a"),
        ("on", 1),
        ("on", "yes"),
    ],
)
def test_wrong_types_are_named(key, given):
    with pytest.raises(ConfigError, match=rf"config\.t\.{key} = .*expected"):
        fill(Thing, {"steps": 1, key: given}, "config.t")


@pytest.mark.parametrize(
    ("key", "nearest"), [("step", "steps"), ("ratte", "rate"), ("level", "levels")]
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(
        ConfigError,
        match=rf"Unknown key config\.t\.{key}\. "
        rf"Did you mean '{nearest}'\? Known keys: steps, rate",
    ):
        fill(Thing, {"steps": 1, key: 1}, "config.t")


def test_what_resembles_nothing_gets_the_list_alone():
    with pytest.raises(ConfigError) as error:
        fill(Thing, {"steps": 1, "zzz": 1}, "config.t")
    assert "Did you mean" not in str(error.value) and "Known keys: steps, " in str(error.value)


@pytest.mark.parametrize("key", ["constant", "parent", "name"])
def test_what_is_no_setting_cannot_be_set(key):
    with pytest.raises(ConfigError, match="Unknown key"):
        fill(Layer if key != "constant" else Thing, {"width": 1, "steps": 1, key: None}, "config.t")


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match=r"config\.t lacks steps\."):
        fill(Thing, {"rate": 1.0}, "config.t")


def test_given_fields_are_the_programs():
    assert fill(Layer, {}, "config.t", width=8, parent=None).width == 8
    with pytest.raises(ConfigError, match=r"Unknown key config\.t\.width"):
        fill(Layer, {"width": 4}, "config.t", width=8)


def test_a_name_becomes_an_object():
    assert build({"name": "thing", "steps": 3}, TABLE, "config.t") == Thing(3)
    with pytest.raises(
        ConfigError,
        match=r"config\.t: unknown name 'think'. Did you mean 'thing'\?"
        " Known: thing, layer",
    ):
        build({"name": "think", "steps": 3}, TABLE, "config.t")
    with pytest.raises(ConfigError, match=r"config\.t lacks a name. Known: thing, layer"):
        build({"steps": 3}, TABLE, "config.t")
    with pytest.raises(ConfigError, match="unknown name None"):
        lookup(None, TABLE, "config.t")


def test_the_spec_is_left_alone():
    spec = {"name": "thing", "steps": 3, "extra": {"a": 1}}
    thing = build(spec, TABLE, "config.t")
    thing.extra["a"] = 2
    assert spec == {"name": "thing", "steps": 3, "extra": {"a": 1}}
