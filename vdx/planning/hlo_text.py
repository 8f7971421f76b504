"""Parser of a compiled program's text (HLO).

The text is that of `jax.stages.Compiled.as_text`. A module is a list of computations, one of them
the entry. A computation is a list of instructions, one a line:

    %y = f32[8,16]{1,0:T(8,128)S(1)} dot(%a, %b), lhs_contracting_dims={1}, ...

The shape of the result follows the equals sign, a tuple's in parentheses. The braces after a shape
are its layout, and `S(1)` in a layout is a memory space other than the chip's main memory.
"""

import dataclasses
import math
import re
from typing import NamedTuple

# Type -> bits of an entry. Two kinds have no row: the float8 types, of which there are many, have
# 8 bits, and tokens and opaque values none.
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

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) ")  # "ENTRY %main (x: f32[8]) -> f32[8] {"
_NAME = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")  # "f32[8,8]{1,0}"
_OTHER_MEMORY = re.compile(r"S\([1-9]")
_CALLS = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|called_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of one result of an instruction."""

    sizes: tuple[int, ...]
    bytes: float  # not an integer for types of less than a byte
    in_main_memory: bool  # in the chip's large memory, not in a small fast one


class Callee(NamedTuple):
    """A computation that an instruction calls."""

    role: str  # the attribute that names it, such as "body"
    computation: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]  # one, or the entries of a tuple
    operands: tuple[str, ...]  # names of instructions of the same computation
    attributes: str  # the text after the opcode, operands included
    is_root: bool  # its result is that of its computation

    @property
    def callees(self) -> list[Callee]:
        """Return the computations that the instruction calls."""
        return [
            Callee(role, name)
            for role, names in _CALLS.findall(self.attributes)
            for name in _NAME.findall(names)
        ]


Computation = dict[str, Instruction]  # by name, in the order of the text


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program."""

    computations: dict[str, Computation]
    entry: str  # name of the computation that runs first

    def operand_arrays(self, computation: str, instruction: Instruction) -> list[Array]:
        """Return the arrays that an instruction reads, tuples taken apart."""
        known = self.computations[computation]
        arrays: list[Array] = []
        for operand in instruction.operands:
            if operand in known:
                arrays.extend(known[operand].results)
        return arrays

    def fused(self, fusion: Instruction) -> Computation:
        """Return the computation of a fusion, which runs as one instruction."""
        for callee in fusion.callees:
            if callee.role == "calls":
                return self.computations[callee.computation]
        raise ValueError(f"The fusion {fusion.name} has no attribute calls={{computation}}.")


def parse_module(text: str) -> Module:
    """Parse the text of a program.

    Lines that are no instructions are skipped: the metadata of a kernel are of several lines.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        # Between computations.
        if current is None:
            head = _HEAD.match(line)
            if head and line.endswith("{"):
                is_entry, name = head.groups()
                current = computations.setdefault(name, {})
                if is_entry:
                    entry = name
            continue

        # Inside one.
        if line.rstrip() == "}":
            current = None
            continue
        instruction = parse_instruction(line)
        if instruction is not None:
            current[instruction.name] = instruction

    return Module(computations, entry)


def parse_instruction(line: str) -> Instruction | None:
    """Parse one line; return None for a line that is no instruction."""
    line = line.strip()
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None

    # "(f32[8], s32[]) while(%a), ..." or "f32[8] dot(%a, %b), ..."
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shapes = rest[:end]
    rest = rest[end:].lstrip()

    # "dot(%a, %b), ..."
    start = rest.find("(")
    stop = _closing(rest, start)

    return Instruction(
        name=name.removeprefix("%"),
        opcode=rest[:start],
        results=parse_shapes(shapes),
        operands=tuple(_NAME.findall(rest[start:stop])),
        attributes=rest[start:],
        is_root=line.startswith("ROOT "),
    )


def parse_shapes(text: str) -> tuple[Array, ...]:
    """Parse the shape of a result, a tuple's as one array an entry.

    Nested tuples are flattened.
    """
    arrays = []
    for dtype, sizes_text, layout in _SHAPE.findall(text):
        sizes = tuple(int(size) for size in sizes_text.split(",") if size)
        bits = BITS.get(dtype, 0)
        if dtype.startswith("f8"):
            bits = 8
        in_main_memory = _OTHER_MEMORY.search(layout) is None
        arrays.append(Array(sizes, math.prod(sizes) * bits / 8, in_main_memory))
    return tuple(arrays)


def _closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)
