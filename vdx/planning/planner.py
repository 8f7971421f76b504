"""Plans: the needs of a job on a slice of chips, and its least time and cost."""

import dataclasses
import math
from typing import Any

import jax

from vdx.hardware import Chip
from vdx.planning.compiled import compile_needs
from vdx.planning.estimate import Counts, estimate_needs
from vdx.planning.job import Job, Slice
from vdx.planning.programs import model_flops, stated_flops


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a job on a slice. Times are in seconds, sizes in bytes."""

    what: str  # "train", "sample" or "decode"
    topology: str  # the slice's name
    devices: int
    mesh: dict[str, int]  # axis -> devices along it
    compiled: bool  # False: estimated
    clip: tuple[int, ...]  # [t h w c] in the model's space
    text: int | None  # tokens of a cached caption
    clips: int  # of one call
    tokens: int  # of one clip
    remat: str
    parameters: int
    trained: int  # parameters that are trained
    model_flops: float  # operations that the mathematics needs, of all devices
    stated_flops: float  # operations that the traced program states, of all devices
    memory_has: float  # of a device
    fits: bool
    compile_seconds: float | None  # None if estimated
    memory: dict[str, float]  # purpose -> bytes of a device, or {"needs": all of them}
    counts: Counts | None  # of a device; None if the compiler ran out of memory
    bounds: dict[str, float] | None  # least seconds of a call, by what limits it; None as `counts`

    @property
    def memory_needs(self) -> float:
        """Return the bytes that a device needs."""
        return self.memory.get("needs", sum(self.memory.values()))

    @property
    def seconds(self) -> float:
        """Return the least time of a call, infinite for a program that cannot run."""
        return math.inf if self.bounds is None else max(self.bounds.values())

    @property
    def seconds_per_clip(self) -> float:
        """Return the least time of a clip, infinite for a program that cannot run."""
        return self.seconds / self.clips

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a flat dictionary; what was not counted is left out."""
        row = dataclasses.asdict(self)
        row["clip"] = list(self.clip)
        bounds = row.pop("bounds")
        counts = row.pop("counts")
        if self.compile_seconds is None:
            del row["compile_seconds"]
        if counts is not None:
            if counts["kernels"] is None:
                del counts["kernels"]
            row |= counts | {"bounds": bounds}
        return row


def plan_job(job: Job, slice_: Slice) -> Plan:
    """Compile or estimate a job for a slice.

    Raises ConfigError for a job or a slice that cannot be planned.
    """
    experiment = job.experiment
    mesh = slice_.mesh(experiment.mesh_spec)
    stated = stated_flops(job)

    # The needs, and whether a device has as much memory.
    memory_has = slice_.chip.memory
    if slice_.compiles:
        needs = compile_needs(job, mesh)
        fits = needs.counts is not None
        if needs.memory_has is not None:
            memory_has = needs.memory_has
    else:
        needs = estimate_needs(job, mesh, stated)
        fits = sum(needs.memory.values()) <= memory_has

    # The least time, from what was counted.
    bounds = None
    if needs.counts is not None:
        bounds = least_seconds(needs.counts, slice_.chip, stated / mesh.size)

    trained = jax.eval_shape(experiment.new_params, jax.random.key(0))
    return Plan(
        what=job.what,
        topology=slice_.name,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        compiled=slice_.compiles,
        clip=job.clip,
        text=job.text,
        clips=job.clips,
        tokens=experiment.model.num_tokens((1, *job.clip)),
        remat=experiment.config["model"]["backbone"].get("remat", "none"),
        parameters=num_entries(experiment.shapes),
        trained=num_entries(trained),
        model_flops=model_flops(job),
        stated_flops=stated,
        memory_has=memory_has,
        fits=fits,
        compile_seconds=needs.compile_seconds,
        memory=needs.memory,
        counts=needs.counts,
        bounds=bounds,
    )


def least_seconds(counts: Counts, chip: Chip, stated_flops: float) -> dict[str, float]:
    """Return {limit: least seconds of a call} of a device.

    stated_flops: of one device. They replace those that are counted where kernels, whose inside
    the compiled text does not show, make them the larger number.
    """
    flops = counts.flops
    if counts.kernels:
        flops = max(flops, stated_flops)
    return {
        "arithmetic": flops / chip.flops,
        "memory": counts.traffic / chip.bandwidth,
        "interconnect": counts.sent / chip.interconnect,
    }


def num_entries(tree: Any) -> int:
    """Return the number of entries of all arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
