"""The search for the fastest mesh, remat policy and batch of a training step."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from vdx.config.build import ConfigError
from vdx.models.remat import REMAT
from vdx.models.transformer import Transformer
from vdx.parallel import AXES, MeshSpec
from vdx.planning.estimate import bytes_sent, least_memory
from vdx.planning.job import Job, Slice, abstract_mesh
from vdx.planning.planner import Plan, plan_job

DOUBLINGS = 8  # batches of 1, 2, 4, ... 128 clips for each share of the batch


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to lay out a job, estimated before anything is compiled."""

    sections: dict[str, Any]  # of the config
    memory: float  # bytes that a device needs at least
    seconds: float  # of a clip, roughly


def search(job: Job, slice_: Slice, most: int) -> list[Plan]:
    """Plan the `most` variants that are estimated to be fastest and may fit.

    Plans that fit come first, the fastest before the others. Of variants that are estimated to be
    equally fast, those that need least memory are planned.

    Raises ConfigError for a job that is no training.
    """
    if job.what != "train":
        raise ConfigError("--search is for --what=train.")

    # Estimate all variants, and keep the most promising.
    capacity = slice_.chip.memory
    found = list(variants(job, slice_))
    found.sort(key=lambda variant: (round(variant.seconds, 6), variant.memory))
    may_fit = [variant for variant in found if variant.memory <= capacity]
    chosen = may_fit[:most]
    print(
        f"{len(found)} variants, of which {len(found) - len(may_fit)} need more than the memory "
        f"of a chip; the {len(chosen)} most promising are planned.",
        flush=True,
    )

    # Plan them, which takes a compilation each.
    plans = []
    for variant in tqdm(chosen, desc="plans", unit="plan"):
        plans.append(plan_job(job.with_sections(**variant.sections), slice_))
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds_per_clip))


def variants(job: Job, slice_: Slice) -> Iterator[Variant]:
    """Yield the variants of a training job that its sizes allow."""
    for mesh in tqdm(list(meshes(slice_.devices)), desc="meshes", unit="mesh"):
        try:
            yield from variants_on(job, slice_, mesh)
        except ValueError:  # sizes that do not divide
            continue


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Yield every {axis: devices along it} of `count` devices."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(sizes) == count:
            yield dict(zip(AXES, sizes, strict=True))


def variants_on(job: Job, slice_: Slice, mesh: dict[str, int]) -> Iterator[Variant]:
    """Yield the variants of a training job on one mesh: remat policies times batches.

    Raises ValueError for a mesh over which a size of the job does not divide.
    """
    config = job.experiment.config
    chip = slice_.chip
    forward = job.experiment.model.flops(job.clip, job.text) / slice_.devices / chip.flops

    # The smallest batch is one clip for each share. A larger one needs no other layout.
    shares = mesh["data"] * mesh["fsdp"]
    smallest = job.with_sections(mesh=mesh, data=_with_batch(config["data"], shares))
    check_divides(smallest, mesh)
    laid_out = abstract_mesh(MeshSpec(**mesh), slice_.devices)

    batches = [shares * 2**i for i in range(DOUBLINGS)]
    for remat, clips in itertools.product(REMAT, batches):
        # A backward pass costs two forward passes, and remat one more.
        passes = 3 if remat == "none" else 4
        arithmetic = passes * forward * clips
        interconnect = bytes_sent(smallest, laid_out, clips) / chip.interconnect

        backbone = {**config["model"]["backbone"], "remat": remat}
        yield Variant(
            sections={
                "mesh": mesh,
                "model": {**config["model"], "backbone": backbone},
                "data": _with_batch(config["data"], clips),
            },
            memory=sum(least_memory(smallest, laid_out, clips, remat).values()),
            seconds=max(arithmetic, interconnect) / clips,
        )


def _with_batch(data: dict[str, Any], clips: int) -> dict[str, Any]:
    """Return `config.data` with another global batch."""
    return {**data, "loader": {**data["loader"], "global_batch": clips}}


def check_divides(job: Job, mesh: dict[str, int]) -> None:
    """Raise ValueError if the heads or the frames of tokens do not divide over a mesh."""
    network = job.experiment.model.backbone
    frames = network.grid(job.clip)[0]
    heads = network.dims().heads if isinstance(network, Transformer) else network.heads
    if frames % mesh["context"] or heads % mesh["tensor"]:
        raise ValueError(
            f"{frames} frames of tokens do not divide over context={mesh['context']}, or {heads} "
            f"heads over tensor={mesh['tensor']}."
        )
