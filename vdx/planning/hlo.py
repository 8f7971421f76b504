"""What a compiled program does, counted in its text (HLO): products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once, however often it runs, and so misses nearly
all of a network whose layers are scanned. Here every computation counts as often as it is called:
the body of a `while` as often as its counter says. What is inside a Mosaic (Pallas) kernel is not
text, and is not counted.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from vdx.planning.hlo_products import _convolution
from vdx.planning.hlo_text import Array, Instruction, _parse

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# Instructions that move nothing by themselves.
STILL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: one of COLLECTIVES. bytes: of the arrays that go in or those that come out, whichever
    are more, of one device; largest: of one of them. times: how often it runs. looped: it is inside
    a loop, such as that over layers."""

    kind: str
    bytes: float
    largest: float
    times: int
    looped: bool


class Program:
    """The text of a compiled program, as `jax.stages.Compiled.as_text` gives it."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if current is None:
                if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
                    current = self.computations.setdefault(head[2], {})
                    self.entry = head[2] if head[1] else self.entry
            elif line.rstrip() == "}":  # a kernel's metadata have lines of their own
                current = None
            elif (one := _parse(line)) is not None:
                current[one.name] = one

    @functools.cached_property
    def visits(self) -> list[tuple[str, Instruction, int, bool, bool]]:
        """(computation, instruction, how often it runs, in a loop, in a fusion) of all that runs,
        once for each place that calls it."""
        out: list[tuple[str, Instruction, int, bool, bool]] = []

        def walk(name: str, times: int, looped: bool, fused: bool) -> None:
            for one in self.computations.get(name, {}).values():
                out.append((name, one, times, looped, fused))
                for role, callee in one.callees:
                    if role == "to_apply" and one.opcode != "call":
                        continue  # an addition, or the like
                    trips = self.trips(one) if role == "body" else 1
                    walk(
                        callee,
                        times * trips,
                        looped or role == "body",
                        fused or one.opcode == "fusion",
                    )

        walk(self.entry, 1, False, False)
        return out

    def trips(self, loop: Instruction) -> int:
        """How often the body of a while runs: as XLA says, or what its counter, from 0, is
        compared with; 1 if neither is there."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(found[1])
        condition = dict(loop.callees).get("condition", "")
        limits = [
            int(found[1])
            for one in self.computations.get(condition, {}).values()
            if one.opcode == "constant" and (found := re.match(r"\((\d+)\)", one.attributes))
        ]
        return limits[0] if len(limits) == 1 else 1

    @property
    def flops(self) -> float:
        """Operations of products and convolutions, of one device, two to a multiply-add."""
        return float(
            sum(times * self._products(name, one) for name, one, times, _, _ in self.visits)
        )

    @property
    def traffic(self) -> float:
        """Bytes to and from a device's memory, if every instruction reads its operands and writes
        its result once, a fusion being one instruction: the slices of an operand, where it takes
        no more, and of a result, where the rest stays what it is."""
        return float(
            sum(
                times * self._moved(name, one)
                for name, one, times, _, fused in self.visits
                if not fused
                and one.opcode not in STILL
                and not one.opcode.endswith(("-done", "-update"))
            )
        )

    @property
    def kernels(self) -> int:
        """How often a kernel runs, of which nothing is counted."""
        return sum(
            times for _, one, times, _, _ in self.visits if "tpu_custom_call" in one.attributes
        )

    @property
    def collectives(self) -> list[Collective]:
        """An asynchronous one on a TPU stands in several fusions, all with its channel."""
        out: dict[str, Collective] = {}
        for name, one, times, looped, _ in self.visits:
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                given = [a.bytes for a in self._operands(name, one)]
                made = [a.bytes for a in one.result]
                # What is asynchronous returns its operands beside its results.
                both = kind != one.opcode and len(made) > len(given)
                moved = max(sum(given), sum(made) - both * sum(given))
                channel = re.search(r"channel_id=\d+", one.attributes)
                out.setdefault(
                    channel[0] if channel else f"{name}/{one.name}",
                    Collective(kind, moved, max(given + made), times, looped),
                )
        return list(out.values())

    def _operands(self, name: str, one: Instruction) -> list[Array]:
        known = self.computations[name]
        return [a for operand in one.operands if operand in known for a in known[operand].result]

    def _moved(self, name: str, one: Instruction) -> float:
        inside, known = self._inside(one), self.computations[name]
        if one.opcode in ("copy-start", "slice-start"):  # -> (from, to, ...)
            start, end = one.result[:2]
            return end.bytes * (start.here + end.here)
        if one.opcode in ("slice", "dynamic-slice"):
            return 2.0 * _here(one.result)
        if one.opcode == "dynamic-update-slice":
            return 2.0 * _here(known[one.operands[1]].result)
        read = sum(
            self._read(inside, i, _here(known[operand].result))
            for i, operand in enumerate(one.operands)
            if operand in known
        )
        return read + self._written(inside, one.result)

    def _inside(self, one: Instruction) -> str:
        """The computation of a fusion, else nothing."""
        return (
            next((callee for role, callee in one.callees if role == "calls"), "")
            if one.opcode == "fusion"
            else ""
        )

    def _read(self, inside: str, index: int, size: float) -> float:
        """Of the `size` bytes of an operand, those that are read: of a fusion's perhaps slices."""
        if not inside:
            return size
        known = self.computations[inside]
        parameter = next(
            one.name
            for one in known.values()
            if one.opcode == "parameter" and one.attributes.startswith(f"({index})")
        )

        def taken(name: str) -> float:
            total = 0.0
            for one in known.values():
                for i, operand in enumerate(one.operands):
                    if operand != name:
                        continue
                    if one.opcode == "bitcast":
                        total += taken(one.name)
                    elif one.opcode in ("slice", "dynamic-slice") and i == 0:
                        total += sum(a.bytes for a in one.result)
                    elif one.opcode == "fusion":
                        total += self._read(self._inside(one), i, size)
                    elif not (
                        one.opcode == "tuple"
                        or one.opcode in COLLECTIVES
                        or (one.opcode == "dynamic-update-slice" and i == 0)
                    ):
                        return size
            return total

        return min(size, taken(parameter))

    def _written(self, inside: str, results: tuple[Array, ...]) -> float:
        """Of the bytes of the results, those that are written: none of what passes through a fusion
        or is on its way from other devices."""
        if not inside:
            return _here(results)
        known = self.computations[inside]

        def made(one: Instruction, results: tuple[Array, ...]) -> float:
            if one.opcode == "bitcast":
                return made(known[one.operands[0]], results)
            if one.opcode == "tuple":
                return sum(
                    made(known[name], (result,))
                    for name, result in zip(one.operands, results, strict=True)
                )
            if one.opcode == "dynamic-update-slice":
                return _here(known[one.operands[1]].result) if _here(results) else 0.0
            if one.opcode == "fusion":
                return self._written(self._inside(one), results)
            return 0.0 if one.opcode in ("parameter", *COLLECTIVES) else _here(results)

        return made(next(one for one in known.values() if one.root), results)

    def _products(self, name: str, one: Instruction) -> float:
        if one.opcode not in ("dot", "convolution"):
            return 0.0
        left, right = self._operands(name, one)[:2]
        out = one.result[0]
        if one.opcode == "dot":
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
            contracted = [int(i) for i in dims[1].split(",") if i] if dims else []
            return 2.0 * math.prod(out.sizes) * math.prod(left.sizes[i] for i in contracted)
        return _convolution(left.sizes, right.sizes, out.sizes, one.attributes)


def by_kind(collectives: list[Collective]) -> dict[str, dict[str, Any]]:
    """kind -> {"looped", "outside"} -> {"count", "bytes", "largest"}: how often, all bytes, and
    those of the largest array."""
    out: dict[str, dict[str, Any]] = defaultdict(dict)
    for one in collectives:
        place = out[one.kind].setdefault(
            "looped" if one.looped else "outside", {"count": 0, "bytes": 0.0, "largest": 0.0}
        )
        place["count"] += one.times
        place["bytes"] += one.times * one.bytes
        place["largest"] = max(place["largest"], one.largest)
    return dict(sorted(out.items()))


def _here(arrays: Iterable[Array]) -> float:
    return sum(a.bytes for a in arrays if a.here)
