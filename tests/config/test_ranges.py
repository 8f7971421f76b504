"""Every number that a config, a request or a manifest holds has a range, and keeps to it."""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from absl import flags

from tests.config.test_reference import CLASSES
from vdx.config.build import (
    ConfigError,
    check_entries,
    configurable_fields,
    convert,
    fill,
    type_name,
)
from vdx.config.ranges import (
    MAX_FLOAT,
    MAX_INT,
    Count,
    Decay,
    Finite,
    Fraction,
    Index,
    Interval,
    Length,
    LevelBlocks,
    NonNegative,
    OneOf,
    Positive,
    PositiveFraction,
    Seed,
    define_number,
)
from vdx.generate.generator import Sampling
from vdx.generate.pretrained_request import PretrainedRequest
from vdx.train.optim import Optimizer

ROWS = {row: section.given for section, row in CLASSES} | {PretrainedRequest: ()}
FIELDS = [
    (row, name, hint)
    for row, given in ROWS.items()
    for name, hint in configurable_fields(row).items()
    if name not in given
]
OPEN = ("digests", "mesh", "sampling", "controls")  # sections that other classes check


def leaves(hint: Any, path: tuple = ()):
    """Yield (way to nest a value in the field, hint) of every type of a field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in args:
            yield from leaves(option, path)
    elif origin is tuple:
        for one in set(args) - {Ellipsis}:
            yield from leaves(one, (*path, len(args) if Ellipsis not in args else 1))
    else:
        yield path, hint


def nested(value: Any, path: tuple) -> Any:
    """Return a value inside tuples of these lengths."""
    for length in reversed(path):
        value = (value,) * length
    return value


def numbers(hint: Any) -> Interval | None:
    """Return the range of a leaf."""
    limits = getattr(hint, "__metadata__", ())
    return next((limit for limit in limits if isinstance(limit, Interval)), None)


@pytest.mark.parametrize(
    ("row", "name", "hint"), FIELDS, ids=[f"{row.__name__}.{name}" for row, name, _ in FIELDS]
)
def test_every_number_states_its_range(row, name, hint):
    if name in OPEN:
        return
    for _, leaf in leaves(hint):
        assert leaf not in (int, float), f"{row.__name__}.{name} has no range"


RANGED = [
    (row, name, path, leaf)
    for row, name, hint in FIELDS
    for path, leaf in leaves(hint)
    if numbers(leaf)
]
assert len(RANGED) > 100


@pytest.mark.parametrize(
    ("row", "name", "path", "leaf"), RANGED, ids=[f"{r.__name__}.{n}" for r, n, *_ in RANGED]
)
def test_values_out_of_range_name_the_key(row, name, path, leaf):
    kind, interval = leaf.__origin__, numbers(leaf)
    if kind is int:
        bad = [interval.low - 1, interval.high + 1, 10**400, 2.5]
        if typing.get_origin(configurable_fields(row)[name]) and interval.low - 1 == -1:
            bad = bad[1:] if "-1" in type_name(configurable_fields(row)[name]) else bad
    else:
        low, high = interval.low, interval.high
        bad = [low if interval.low_open else math.nextafter(low, -math.inf)]
        bad += [high if interval.high_open else math.nextafter(high, math.inf)]
    bad += [math.nan, math.inf, -math.inf, "many", True, {"a": 1}]
    for value in bad:
        given = nested(value, path)
        with pytest.raises(ConfigError, match=rf"config\.x\.{name} = "):
            convert(row, {name: given}, "config.x")


@pytest.mark.parametrize("row", list(dict.fromkeys(row for _, row in CLASSES)))
def test_defaults_keep_to_their_ranges(row):
    """And they are not changed by the check."""
    defaults = {}
    for field in dataclasses.fields(row):
        if field.name in configurable_fields(row):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
    required = [name for name in configurable_fields(row) if name not in defaults]
    assert convert(row, defaults, "config.x", required) == defaults


def test_bounds_are_those_of_the_numbers_of_devices():
    assert np.iinfo(np.int32).max == MAX_INT and np.finfo(np.float32).max == MAX_FLOAT


@dataclasses.dataclass(frozen=True)
class Toy:
    mode: Literal["fast", "slow"] = "fast"
    order: Literal[1, 2] = 1
    row: Annotated[str, OneOf(lambda: TABLE)] = "red"
    mesh: Literal[-1] | Count = -1
    sizes: tuple[Count, ...] | Count = 1
    scales: dict[str, Finite] = dataclasses.field(default_factory=dict)
    rate: Fraction | None = None
    levels: Annotated[tuple[Count, ...], Length(2)] = ()


TABLE = {"red": 1, "green": 2}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mode", "fats", r"config\.t\.mode: unknown name 'fats'\. Did you mean 'fast'\? Known"),
        ("mode", 1, r"config\.t\.mode = 1 is int, expected 'fast' \| 'slow'"),
        ("order", 3, r"config\.t\.order: unknown name 3\. .*Known: 1, 2"),
        ("order", True, r"config\.t\.order = True is bool"),
        ("row", "gren", r"config\.t\.row: unknown name 'gren'\. Did you mean 'green'\?"),
        ("row", ["red"], r"config\.t\.row = \['red'\] is list, expected str"),
        ("mesh", 0, r"config\.t\.mesh = 0 is out of range, expected -1 \| int >= 1"),
        ("sizes", [4, 0], r"config\.t\.sizes = 0 is out of range, expected int >= 1"),
        ("scales", {"a": math.nan}, r"config\.t\.scales\.a = nan is not a finite number"),
        ("levels", [1, 1, 1], r"levels = .*, expected tuple\[int >= 1, \.\.\.\] of at most 2"),
        ("levels", [1, 0], r"config\.t\.levels = 0 is out of range"),
        ("rate", 2, r"config\.t\.rate = 2\.0 is out of range, expected float in \[0, 1\]"),
    ],
)
def test_messages_of_choices_unions_and_mappings(key, value, message):
    with pytest.raises(ConfigError, match=message):
        fill(Toy, {key: value}, "config.t")


def test_entries_of_strangers_are_checked_as_fields_are():
    hints = {"size": Count, "inside": {"size": Count}}
    check_entries({"size": 1, "inside": {"size": 1, "other": "x"}, "other": []}, hints, "file")
    for entries, reason in (
        ({"size": 0}, "file: size = 0 is out of range, expected int >= 1"),
        ({"inside": {"size": None}}, "file: inside: size = None is NoneType, expected int"),
        ({"inside": []}, r"file: inside = \[\] is list, expected dict"),
        ({"size": "a" * 10**6}, r"file: size = 'a{499}\.\.\. is str"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_entries(entries, hints, "file")


def test_a_list_may_be_as_long_as_its_limit():
    assert fill(Toy, {"levels": [1, 2]}, "config.t").levels == (1, 2)


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Count, "int >= 1"),
        (Index, "int >= 0"),
        (Seed, "int in [0, 2^64 - 1]"),
        (Finite, "float"),
        (Positive, "float > 0"),
        (NonNegative, "float >= 0"),
        (Fraction, "float in [0, 1]"),
        (Decay, "float in [0, 1)"),
        (PositiveFraction, "float in (0, 1]"),
        (LevelBlocks, "int in [1, 8]"),
        (tuple[Count, ...] | None, "tuple[int >= 1, ...] | None"),
    ],
)
def test_ranges_read_as_a_type(hint, text):
    assert type_name(hint) == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimizer(max_grad_norm=-1.0), "max_grad_norm = -1.0 is out of range"),
        (lambda: Optimizer(schedule="cosin"), "Did you mean 'cosine'"),
        (lambda: Sampling(steps=0), "steps = 0 is out of range"),
        (lambda: dataclasses.replace(Sampling(), shift=math.inf), "shift = inf is not a finite"),
        (lambda: Sampling(guidance_interval=(0.9, 0.1)), "guidance_interval"),
    ],
)
def test_classes_of_programs_check_themselves(make, message):
    """Also where no config fills them."""
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Seed, ["0", str(2**64 - 1)], ["-1", str(2**64), "1.5"]),
        (Count, ["1", str(MAX_INT)], ["0", str(MAX_INT + 1), "nan"]),
        (Positive, ["1e-3", str(MAX_FLOAT)], ["0", "nan", "inf", "-1", "1e39"]),
    ],
)
def test_flags_have_ranges(hint, good, bad):
    for text in [*good, *bad]:
        known = flags.FlagValues()
        define_number("size", None, hint, "A size.", known)
        arguments = ["program", f"--size={text}"]
        if text in good:
            known(arguments)
            assert known.size == hint.__origin__(text)
        else:
            with pytest.raises(flags.Error, match="size"):
                known(arguments)
