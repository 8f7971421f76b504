"""Ranges of numbers and choices of names, stated where a field is defined.

    steps: Count = 20  # an integer, at least 1
    eta: Fraction = 0.0  # a number in [0, 1]
    sampler: Annotated[str, OneOf(lambda: SAMPLERS)] = "dpmpp_2m"  # a row of SAMPLERS
    start: Literal["random", "first"] = "random"

`vdx.config.build` reads them wherever a config, a request or a manifest fills a class.
`define_number` gives a flag the same ranges.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Sized
from typing import Annotated, Any, Literal

from absl import flags

__all__ = [
    "Channels",
    "ComputeType",
    "Count",
    "Decay",
    "Finite",
    "Fraction",
    "Index",
    "Interval",
    "Length",
    "LevelBlocks",
    "NonNegative",
    "OneOf",
    "Positive",
    "PositiveFraction",
    "Seed",
    "define_number",
]

MAX_INT = 2**31 - 1  # of the integers that devices compute with
MAX_FLOAT = (2 - 2**-23) * 2.0**127  # of float32; a larger number is infinite there


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`, ends included unless they are open."""

    low: float = -MAX_FLOAT
    high: float = MAX_FLOAT
    low_open: bool = False  # `low` itself is out
    high_open: bool = False  # `high` itself is out

    def __contains__(self, value: float) -> bool:
        """Return whether a number is inside; NaN never is."""
        if (self.low_open and value == self.low) or (self.high_open and value == self.high):
            return False
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """Return how the range reads after a type, such as ">= 1" or "in [0, 1)"."""
        if self.high not in (MAX_INT, MAX_FLOAT):
            left = "(" if self.low_open else "["
            right = ")" if self.high_open else "]"
            return f"in {left}{self.low:g}, {_bound(self.high)}{right}"
        if self.low == -MAX_FLOAT:
            return ""
        return f"{'>' if self.low_open else '>='} {self.low:g}"


@dataclasses.dataclass(frozen=True)
class Length:
    """The lists of at most `most` entries."""

    most: int

    def __contains__(self, value: Sized) -> bool:
        """Return whether a list is short enough."""
        return len(value) <= self.most

    def __str__(self) -> str:
        """Return how the limit reads after a type."""
        return f"of at most {self.most}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The names of a table, which may be defined below the field."""

    names: Callable[[], Iterable[str]]


def _bound(value: float) -> str:
    """Return the upper end of a range; a power of two less one has too many digits."""
    if value > MAX_INT and math.log2(value + 1).is_integer():
        return f"2^{math.log2(value + 1):.0f} - 1"
    return f"{value:g}"


Count = Annotated[int, Interval(1, MAX_INT)]
Channels = Annotated[int, Interval(1, 1_000_000)]  # of a layer; its arrays stay below 2^63 bytes
LevelBlocks = Annotated[int, Interval(1, 8)]  # of one level of a network; each is traced
Index = Annotated[int, Interval(0, MAX_INT)]  # an integer that may also be 0
Seed = Annotated[int, Interval(0, 2**64 - 1)]
Finite = Annotated[float, Interval()]
Positive = Annotated[float, Interval(0, low_open=True)]
NonNegative = Annotated[float, Interval(0)]
Fraction = Annotated[float, Interval(0, 1)]
ComputeType = Literal["float32", "bfloat16"]  # of matrix products
PositiveFraction = Annotated[float, Interval(0, 1, low_open=True)]
Decay = Annotated[float, Interval(0, 1, high_open=True)]  # of a moving average


def define_number(
    name: str,
    default: float | None,
    hint: Any,
    text: str,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Define a flag whose range is that of `hint`, such as Count."""
    kind, interval = typing.get_args(hint)[:2]
    expected = f"{kind.__name__} {interval}".strip()
    define: Callable[..., Any] = flags.DEFINE_integer if kind is int else flags.DEFINE_float
    define(name, default, text, flag_values=flag_values)
    flags.register_validator(
        name,
        lambda value: value is None or value in interval,
        message=f"It is out of range, expected {expected}.",
        flag_values=flag_values,
    )
