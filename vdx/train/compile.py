"""Programs of the training step, one for each shape of batch, compiled before they are needed."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vdx.config.build import ConfigError
from vdx.hardware import chip_of
from vdx.parallel import BATCH, abstract_batch
from vdx.types import Batch


class StepCost(NamedTuple):
    """What a step does: clips and tokens of its batch, and operations of the model: three forward
    passes, as a backward pass is two, whatever remat repeats; 0 where no MFU can be said."""

    clips: int = 0
    tokens: int = 0
    flops: float = 0.0


def peak_flops(mesh: Mesh) -> float:
    """Operations a second of all devices at best; 0 for a chip that is not in the table."""
    chip = chip_of(mesh.devices.flat[0].device_kind)
    return 0.0 if chip is None else chip.flops * mesh.size


class StepCompiler:
    """(compiled step, its Work) for a batch. Every shape of batch is compiled once, in a thread
    beside the loop: first that of the first batch, then the others that `samples` tells of, while
    the first steps are taken.

    step: the jitted step(state, batch, frozen). like: the abstract state. samples: see `Batches`.
    Raises ConfigError for a batch of `config.data.loader` that the mesh cannot split, ValueError
    for a bucket that is no number of patches.
    """

    def __init__(
        self,
        step: Any,
        like: Any,
        frozen: Any,
        experiment,
        mesh: Mesh,
        samples: Callable[[], Iterable[tuple[int, Mapping]]],
    ):
        self.step, self.abstract_state, self.frozen = step, like, frozen
        self.model, self.mesh, self.samples = experiment.model, mesh, samples
        self.known: dict[frozenset, Future] = {}
        self.thread = ThreadPoolExecutor(1, "compile")
        loader = experiment.data.loader
        buckets, parts = loader.get("buckets", ()), int(np.prod([mesh.shape[a] for a in BATCH]))
        for *clip, batch in buckets or [[loader["global_batch"]]]:
            if batch % parts:
                raise ConfigError(
                    f"A batch of {batch} clips does not divide over the mesh axes "
                    f"{' and '.join(BATCH)}, {parts} parts: take a multiple."
                )
            if clip:
                self.model.num_tokens((batch, *clip, self.model.channels))

    def __call__(self, batch: Batch) -> tuple[Callable[..., tuple], StepCost]:
        first, made = not self.known, self.begin(batch)
        if first:
            for local, example in self.samples():
                self.begin(abstract_batch(self.mesh, example, local))
        return made.result()

    def begin(self, batch: Mapping[str, Any]) -> Future:
        """The program for such a batch, which may be abstract: made, or in the making."""
        shapes = frozenset((name, x.shape, x.dtype) for name, x in batch.items())
        if shapes not in self.known:
            self.known[shapes] = self.thread.submit(self.compiled, batch)
        return self.known[shapes]

    def compiled(self, batch: Mapping[str, Any]) -> tuple[Callable[..., tuple], StepCost]:
        with jax.set_mesh(self.mesh):  # which each thread has its own of
            clips, *clip = batch["latents" if "latents" in batch else "video"].shape
            flops, text = 0.0, batch.get("text")
            if peak_flops(self.mesh):
                flops = (
                    3
                    * clips
                    * self.model.flops(
                        (*clip[:3], self.model.channels), None if text is None else text.shape[1]
                    )
                )
            work = StepCost(clips, clips * self.model.num_tokens((clips, *clip)), flops)
            return self.step.lower(self.abstract_state, batch, self.frozen).compile(), work

    def close(self) -> None:
        """Begins no other; one that is under way is left to end."""
        self.thread.shutdown(wait=False, cancel_futures=True)
