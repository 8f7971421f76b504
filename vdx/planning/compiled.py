"""The needs of a job as the real compiler finds them, for chips that are not here.

The TPU compiler (libtpu) runs ahead of time on any machine.
"""

import re
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from vdx.planning.estimate import Counts, Needs
from vdx.planning.hlo import Program, by_kind
from vdx.planning.job import Job
from vdx.planning.programs import shaped_program

# Kind of collective -> how often its bytes are sent. The others: once. The addends of an
# all-reduce are sent to where they are summed, and the sum is sent back.
TIMES_SENT = {"all-reduce": 2.0}

_SIZE = r"\(?([\d.]+)([KMGT]?)\)?"  # "51.34G", "(20.83G)"
_OUT_OF_MEMORY = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"temporaries {_SIZE} exceeds available HBM {_SIZE}"),
)


def compile_needs(job: Job, mesh: Mesh) -> Needs:
    """Compile a job for the devices of a mesh and return its needs."""
    with jax.set_mesh(mesh):
        program = shaped_program(job, mesh)
        lowered = program.function.lower(*program.args)

        # A program that needs too much memory is a result, not an error.
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            shortage = out_of_memory(str(error))
            if shortage is None:
                raise
            return Needs(
                memory={"needs": shortage.needs},
                counts=None,
                memory_has=shortage.has,
                compile_seconds=time.perf_counter() - start,
            )

    # The state's new value takes over the memory of the old one, an alias.
    memory = compiled.memory_analysis()
    counts = count_program(compiled.as_text())

    return Needs(
        memory={
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        counts=counts,
        compile_seconds=time.perf_counter() - start,
    )


def count_program(text: str) -> Counts:
    """Count the work of one device in the text of a compiled program."""
    program = Program(text)
    collectives = program.collectives
    sent = 0.0
    for collective in collectives:
        sent += TIMES_SENT.get(collective.kind, 1.0) * collective.bytes * collective.times
    return Counts(
        flops=program.flops,
        traffic=program.traffic,
        kernels=program.kernels,
        sent=sent,
        collectives=by_kind(collectives),
    )


class OutOfMemory(NamedTuple):
    """The device memory that a program lacks, in bytes."""

    needs: float
    has: float


def out_of_memory(message: str) -> OutOfMemory | None:
    """Parse an error of the compiler; return None for one that is not about memory."""
    for pattern in _OUT_OF_MEMORY:
        found = pattern.search(message)
        if found:
            needs, needs_unit, has, has_unit = found.groups()
            return OutOfMemory(float(needs) * _unit(needs_unit), float(has) * _unit(has_unit))
    return None


def _unit(letter: str) -> float:
    """Return the bytes of K, M, G or T, or of no letter."""
    return 1024.0 ** " KMGT".index(letter or " ")
