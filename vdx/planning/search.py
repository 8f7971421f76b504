"""The search over meshes, remat policies and batches."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from vdx.config.build import ConfigError
from vdx.models.transformer import REMAT, Transformer
from vdx.parallel import AXES, MeshSpec
from vdx.planning.estimate import Job, Slice, abstract_mesh, least_memory, plan, sent
from vdx.planning.table import _per_clip


def meshes(count: int) -> Iterator[dict[str, int]]:
    """Every way to lay `count` devices out."""
    parts = [n for n in range(1, count + 1) if count % n == 0]
    for some in itertools.product(parts, repeat=len(AXES)):
        if math.prod(some) == count:
            yield dict(zip(AXES, some, strict=True))


def variants(job: Job, slice_: Slice) -> Iterator[dict[str, Any]]:
    """Rows for --search of what can be laid out, before anything is compiled: sections of the
    config, `memory` that is needed at least, `seconds` a clip, roughly."""
    e, chip, data = job.experiment, slice_.chip, job.experiment.config["data"]
    forward = e.model.flops(job.clip, job.text) / slice_.devices / chip.flops
    for mesh in tqdm(list(meshes(slice_.devices)), desc="meshes", unit="mesh"):
        shares = mesh["data"] * mesh["fsdp"]
        loader = lambda clips: {
            "data": {**data, "loader": {**data["loader"], "global_batch": clips}}
        }
        abstract = abstract_mesh(MeshSpec(**mesh), slice_.devices)
        try:
            one = job.changed(mesh=mesh, **loader(shares))
            fits_grid(one, mesh)
            for remat, clips in itertools.product(REMAT, (shares * 2**i for i in range(8))):
                memory = sum(least_memory(one, abstract, clips, remat).values())
                seconds = (
                    max(
                        (3 if remat == "none" else 4) * forward * clips,
                        sent(one, abstract, clips) / chip.interconnect,
                    )
                    / clips
                )
                backbone = {**e.config["model"]["backbone"], "remat": remat}
                yield {
                    "memory": memory,
                    "seconds": seconds,
                    "sections": {
                        "mesh": mesh,
                        "model": {**e.config["model"], "backbone": backbone},
                        **loader(clips),
                    },
                }
        except ValueError:  # sizes that do not divide
            continue


def fits_grid(job: Job, mesh: dict[str, int]) -> None:
    """Raises ValueError for a mesh over which heads or frames of tokens do not divide."""
    network = job.experiment.model.backbone
    frames = network.grid(job.clip)[0]
    heads = network.dims()[2] if isinstance(network, Transformer) else network.heads
    if frames % mesh["context"] or heads % mesh["tensor"]:
        raise ValueError(f"{mesh}: {frames} frames of tokens, {heads} heads")


def search(job: Job, slice_: Slice, most: int) -> list[dict[str, Any]]:
    """Plans of the `most` variants that seem fastest and may fit, the fastest first, then those
    that do not fit. Of what seems equally fast the one that needs least memory comes first."""
    if job.what != "train":
        raise ConfigError("--search is for --what=train.")
    has = slice_.chip.memory
    found = sorted(variants(job, slice_), key=lambda row: (round(row["seconds"], 6), row["memory"]))
    kept = [row for row in found if row["memory"] <= has][:most]
    print(
        f"{len(found)} variants, of which {sum(r['memory'] > has for r in found)} need more than "
        f"the memory of a chip; the {len(kept)} most promising are looked at.",
        flush=True,
    )
    rows = [
        plan(job.changed(**row["sections"]), slice_)
        for row in tqdm(kept, desc="plans", unit="plan")
    ]
    return sorted(rows, key=lambda row: (not row["fits"], _per_clip(row)))
