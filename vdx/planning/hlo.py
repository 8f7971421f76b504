"""Counts of what a compiled program does, from its text (HLO).

Counted are products, memory traffic, kernels and collectives. XLA's own cost analysis counts the
body of a loop once, however often it runs. It so misses nearly all of a network whose layers are
scanned. Here a computation counts as often as it is called, and the body of a `while` as often as
its counter states. The inside of a Mosaic (Pallas) kernel is not text, and does not count.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypedDict

from vdx.planning.hlo_products import convolution_flops, dot_flops
from vdx.planning.hlo_text import Instruction, Module, parse_module
from vdx.planning.hlo_traffic import COLLECTIVES, bytes_moved, is_still

_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=\d+")
KERNEL = "tpu_custom_call"  # target of the call of a Mosaic kernel


class Visit(NamedTuple):
    """An instruction at one of the places that call its computation."""

    computation: str
    instruction: Instruction
    times: int  # how often it runs there
    in_loop: bool
    in_fusion: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """A communication between devices, as one of them runs it."""

    kind: str  # one of COLLECTIVES
    bytes: float  # of the arrays that go in or of those that come out, whichever are more
    largest: float  # bytes of the largest of these arrays
    times: int  # how often it runs
    in_loop: bool  # such as the loop over layers


class Program:
    """The counts of a program, from the text that `jax.stages.Compiled.as_text` gives."""

    def __init__(self, text: str) -> None:
        self.module = parse_module(text)

    @functools.cached_property
    def visits(self) -> list[Visit]:
        """Return every instruction that runs, once for each place that calls it."""
        return list(_walk(self.module, self.module.entry))

    @property
    def flops(self) -> float:
        """Return the operations of products and convolutions, of one device."""
        return float(sum(visit.times * _flops(self.module, visit) for visit in self.visits))

    @property
    def traffic(self) -> float:
        """Return the bytes to and from a device's main memory.

        Instructions inside a fusion move nothing by themselves: the fusion counts as one.
        """
        total = 0.0
        for visit in self.visits:
            if not visit.in_fusion and not is_still(visit.instruction):
                moved = bytes_moved(self.module, visit.computation, visit.instruction)
                total += visit.times * moved
        return total

    @property
    def kernels(self) -> int:
        """Return how often a kernel runs; nothing of it counts elsewhere."""
        return sum(visit.times for visit in self.visits if KERNEL in visit.instruction.attributes)

    @property
    def collectives(self) -> list[Collective]:
        """Return the collectives, each channel once.

        An asynchronous one is written in several fusions on a TPU, with one channel.
        """
        found: dict[str, Collective] = {}
        for visit in self.visits:
            instruction = visit.instruction
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                key = f"{visit.computation}/{instruction.name}"
                channel = _CHANNEL.search(instruction.attributes)
                if channel:
                    key = channel[0]
                found.setdefault(key, _collective(self.module, visit, kind))
        return list(found.values())


def _walk(
    module: Module, computation: str, times: int = 1, in_loop: bool = False, in_fusion: bool = False
) -> Iterator[Visit]:
    """Yield the visits of a computation and of those that it calls.

    Those of a callee follow the instruction that calls it. The computation that a reduction
    applies to two scalars (`to_apply`) is left out.
    """
    for instruction in module.computations.get(computation, {}).values():
        yield Visit(computation, instruction, times, in_loop, in_fusion)
        for role, callee in instruction.callees:
            if role == "to_apply" and instruction.opcode != "call":
                continue
            trips = 1
            if role == "body":
                trips = trip_count(module, instruction)
            yield from _walk(
                module,
                callee,
                times * trips,
                in_loop or role == "body",
                in_fusion or instruction.opcode == "fusion",
            )


def trip_count(module: Module, loop: Instruction) -> int:
    """Return how often the body of a `while` runs.

    This is the count that XLA annotates or, without one, the constant in the loop's condition,
    with which a counter from 0 is compared; 1 if the condition has no or several constants.
    """
    annotated = _TRIP_COUNT.search(loop.attributes)
    if annotated:
        return int(annotated[1])

    condition = dict(loop.callees).get("condition", "")
    limits = []
    for instruction in module.computations.get(condition, {}).values():
        constant = _CONSTANT.match(instruction.attributes)
        if instruction.opcode == "constant" and constant:
            limits.append(int(constant[1]))
    return limits[0] if len(limits) == 1 else 1


def _flops(module: Module, visit: Visit) -> float:
    """Return the operations of one run of an instruction; 0 for what is no product."""
    instruction = visit.instruction
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = module.operand_arrays(visit.computation, instruction)[:2]
    out = instruction.results[0]
    if instruction.opcode == "dot":
        return dot_flops(left, out, instruction.attributes)
    return convolution_flops(left, right, out, instruction.attributes)


def _collective(module: Module, visit: Visit, kind: str) -> Collective:
    """Return the collective of a visit, with the bytes that it moves."""
    instruction = visit.instruction
    inputs = [array.bytes for array in module.operand_arrays(visit.computation, instruction)]
    outputs = [array.bytes for array in instruction.results]

    # The start of an asynchronous one returns its operands together with its results.
    is_start = instruction.opcode != kind
    returned = sum(outputs)
    if is_start and len(outputs) > len(inputs):
        returned -= sum(inputs)
    return Collective(
        kind=kind,
        bytes=max(sum(inputs), returned),
        largest=max(inputs + outputs),
        times=visit.times,
        in_loop=visit.in_loop,
    )


class CollectiveTotals(TypedDict):
    """The collectives of one kind, in loops or outside of them."""

    count: int  # how often they run
    bytes: float  # of all runs
    largest: float  # bytes of the largest array


def by_kind(collectives: Iterable[Collective]) -> dict[str, dict[str, CollectiveTotals]]:
    """Return {kind: {"looped" or "outside": totals}}, the kinds in alphabetical order."""
    kinds: dict[str, dict[str, CollectiveTotals]] = defaultdict(dict)
    for collective in collectives:
        place = "looped" if collective.in_loop else "outside"
        empty = CollectiveTotals(count=0, bytes=0.0, largest=0.0)
        totals = kinds[collective.kind].setdefault(place, empty)
        totals["count"] += collective.times
        totals["bytes"] += collective.times * collective.bytes
        totals["largest"] = max(totals["largest"], collective.largest)
    return dict(sorted(kinds.items()))
