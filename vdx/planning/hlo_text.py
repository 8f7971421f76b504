"""Parser of a compiled program's text (HLO)."""

import dataclasses
import math
import re

BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
}


_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


_CALLS = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    sizes: tuple[int, ...]
    bytes: float
    here: bool  # in the chip's large memory, not in a small fast one


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str  # all that follows the opcode
    root: bool  # its result is that of its computation

    @property
    def callees(self) -> list[tuple[str, str]]:
        """(role, name of a computation)"""
        return [
            (role, name)
            for role, names in _CALLS.findall(self.attributes)
            for name in re.findall(r"%([\w.\-]+)", names)
        ]


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _parse(line: str) -> Instruction | None:
    name, equals, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    stop = _closing(rest, start)
    return Instruction(
        name.removeprefix("%"),
        rest[:start],
        _arrays(kind),
        tuple(re.findall(r"%([\w.\-]+)", rest[start:stop])),
        rest[start:],
        line.lstrip().startswith("ROOT "),
    )


def _arrays(kind: str) -> tuple[Array, ...]:
    out = []
    for dtype, sizes, layout in _SHAPE.findall(kind):
        shape = tuple(int(n) for n in sizes.split(",") if n)
        bits = BITS.get(dtype, 8 if dtype.startswith("f8") else 0)
        out.append(Array(shape, math.prod(shape) * bits / 8, not re.search(r"S\([1-9]", layout)))
    return tuple(out)
