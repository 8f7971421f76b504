"""Bytes that an instruction of a compiled program moves.

They are read from main memory or written to it. The model: an instruction reads its operands once
and writes its result once. A fusion is one instruction, and what it computes on the way is in
registers. Arrays in a small fast memory cost nothing. Slices count as their own size, not as that
of the array they are cut from or put into.
"""

from collections.abc import Iterable

from vdx.planning.hlo_text import Array, Computation, Instruction, Module

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# Instructions that move nothing by themselves: names of arrays, and calls whose computations
# count on their own.
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
# The end of an asynchronous instruction; its start counts.
ASYNC_ENDS = ("-done", "-update")
SLICES = ("slice", "dynamic-slice")


def is_still(instruction: Instruction) -> bool:
    """Return whether an instruction moves nothing by itself."""
    return instruction.opcode in STILL or instruction.opcode.endswith(ASYNC_ENDS)


def bytes_moved(module: Module, computation: str, instruction: Instruction) -> float:
    """Return the bytes that one run of an instruction reads and writes."""
    known = module.computations[computation]
    match instruction.opcode:
        case "copy-start" | "slice-start":
            return _async_copy_bytes(instruction)
        case "slice" | "dynamic-slice":
            # Read the slice, write the slice.
            return 2.0 * main_memory_bytes(instruction.results)
        case "dynamic-update-slice":
            # Operands: array, update, indices. Read the update and write it into place.
            return 2.0 * main_memory_bytes(known[instruction.operands[1]].results)
        case "fusion":
            return _fusion_bytes(module, known, instruction)
    read = main_memory_bytes(module.operand_arrays(computation, instruction))
    return read + main_memory_bytes(instruction.results)


def main_memory_bytes(arrays: Iterable[Array]) -> float:
    """Return the bytes of the arrays that are in the chip's main memory."""
    return sum(array.bytes for array in arrays if array.in_main_memory)


def _async_copy_bytes(instruction: Instruction) -> float:
    """Return the bytes of a copy between two memories.

    Its result is (one end, other end, ...). Each end in main memory is read or written once. The
    second end has the size of the slice.
    """
    first, second = instruction.results[:2]
    return second.bytes * (first.in_main_memory + second.in_main_memory)


def _fusion_bytes(module: Module, known: Computation, fusion: Instruction) -> float:
    """Return the bytes of a fusion: the used parts of its operands, and its results."""
    read = 0.0
    for position, operand in enumerate(fusion.operands):
        if operand in known:
            size = main_memory_bytes(known[operand].results)
            read += _operand_bytes(module, fusion, position, size)
    return read + _result_bytes(module, fusion, fusion.results)


def _operand_bytes(module: Module, fusion: Instruction, position: int, size: float) -> float:
    """Return the bytes that a fusion reads of one operand, at most its `size`."""
    body = module.fused(fusion)
    parameter = next(
        instruction.name
        for instruction in body.values()
        if instruction.opcode == "parameter" and instruction.attributes.startswith(f"({position})")
    )
    return min(size, _used_bytes(module, body, parameter, size))


def _used_bytes(module: Module, body: Computation, name: str, size: float) -> float:
    """Sum the bytes that every use of an array inside a fusion reads."""
    total = 0.0
    for user in body.values():
        for position, operand in enumerate(user.operands):
            if operand == name:
                total += _use_bytes(module, body, user, position, size)
    return total


def _use_bytes(
    module: Module, body: Computation, user: Instruction, position: int, size: float
) -> float:
    """Return the bytes that one use of an array in a fusion reads; `size` for all."""
    if user.opcode == "bitcast":  # another name of the array
        return _used_bytes(module, body, user.name, size)
    if user.opcode in SLICES and position == 0:
        return sum(array.bytes for array in user.results)
    if user.opcode == "fusion":
        return _operand_bytes(module, user, position, size)
    if user.opcode == "tuple" or user.opcode in COLLECTIVES:  # passes through
        return 0.0
    if user.opcode == "dynamic-update-slice" and position == 0:  # the rest stays as it is
        return 0.0
    return size


def _result_bytes(module: Module, fusion: Instruction, results: tuple[Array, ...]) -> float:
    """Return the bytes of the `results` of a fusion that it writes."""
    body = module.fused(fusion)
    root = next(instruction for instruction in body.values() if instruction.is_root)
    return _written_bytes(module, body, root, results)


def _written_bytes(
    module: Module, body: Computation, made_by: Instruction, results: tuple[Array, ...]
) -> float:
    """Return the bytes that a fusion writes to the `results` of one instruction."""
    match made_by.opcode:
        case "bitcast":  # another name of its operand
            return _written_bytes(module, body, body[made_by.operands[0]], results)
        case "tuple":
            return sum(
                _written_bytes(module, body, body[name], (result,))
                for name, result in zip(made_by.operands, results, strict=True)
            )
        case "dynamic-update-slice":
            # The update is written into place, and the rest stays as it is.
            if main_memory_bytes(results) == 0:
                return 0.0
            return main_memory_bytes(body[made_by.operands[1]].results)
        case "fusion":
            return _result_bytes(module, made_by, results)
        case "parameter":  # passes through
            return 0.0

    if made_by.opcode in COLLECTIVES:  # on its way from other devices
        return 0.0
    return main_memory_bytes(results)
