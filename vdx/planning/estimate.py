"""Estimates of a job's needs, without a compiler.

They take the shapes and the traced program alone. They serve GPUs, whose compiler needs a GPU, and
the search, which compares hundreds of variants.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vdx.models.transformer import Transformer
from vdx.planning.hlo import CollectiveTotals
from vdx.planning.job import Job
from vdx.planning.programs import shaped_program

# Remat policy -> features that every block keeps for the backward pass, in widths of a token: the
# operands of its products ("none"), or their results ("dots"). Other policies keep only the input
# of each period of the pattern.
KEPT_WIDTHS = {"none": 16, "dots": 11}


@dataclasses.dataclass(frozen=True)
class Counts:
    """The work of one device in one call."""

    flops: float
    traffic: float  # bytes to and from its memory
    kernels: int | None  # runs of kernels, which `flops` leaves out; None if estimated
    sent: float  # bytes to other devices
    # Kind of collective -> its totals in loops and outside (see `by_kind`); empty if estimated.
    collectives: dict[str, dict[str, CollectiveTotals]]


@dataclasses.dataclass(frozen=True)
class Needs:
    """The needs of a program on one device, estimated or compiled."""

    # Purpose -> bytes. {"needs": all of them} for a program that does not fit.
    memory: dict[str, float]
    counts: Counts | None  # None: the compiler ran out of the device's memory
    memory_has: float | None = None  # bytes there are; None: the compiler does not report it
    compile_seconds: float | None = None  # None if estimated


def estimate_needs(job: Job, mesh: Mesh, stated_flops: float) -> Needs:
    """Return a lower bound of memory and operations, and a rough number of bytes sent.

    stated_flops: of the traced program, of all devices together.
    """
    sent = 0.0
    if job.what == "train":
        sent = bytes_sent(job, mesh)
    counts = Counts(
        flops=stated_flops / mesh.size,
        traffic=2.0 * bytes_per_device(_arguments(job, mesh)),  # each is read and written once
        kernels=None,
        sent=sent,
        collectives={},
    )
    return Needs(least_memory(job, mesh), counts)


def bytes_per_device(tree: Any) -> float:
    """Return the bytes on one device of a tree of shapes, by their shardings.

    Random keys do not count.
    """
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):  # a key
            continue
        shape = leaf.shape
        if leaf.sharding:
            shape = leaf.sharding.shard_shape(shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


# One entry is enough: the search goes from mesh to mesh.
@functools.lru_cache(maxsize=1)
def _arguments(job: Job, mesh: Mesh) -> tuple[Any, ...]:
    """Return the shapes of a job's arguments, laid out on the mesh."""
    return shaped_program(job, mesh).args


def least_memory(
    job: Job, mesh: Mesh, clips: int | None = None, remat: str | None = None
) -> dict[str, float]:
    """Return {purpose: bytes} of one device that no compiler can avoid, approximately.

    These are the arguments and, for training, the gradients and the activations that the backward
    pass starts from. clips: of a call, and remat: if other than the job's.
    """
    args = _arguments(job, mesh)
    clips = clips or job.clips
    if job.what != "train":
        return {"arguments": bytes_per_device(args)}

    state, batch, frozen = args
    batch_bytes = bytes_per_device(batch) * clips / job.clips
    return {
        "arguments": bytes_per_device((state, frozen)) + batch_bytes,
        "gradients": bytes_per_device(state.params),
        "kept": _kept_bytes(job, mesh, clips, remat),
    }


def _kept_bytes(job: Job, mesh: Mesh, clips: int, remat: str | None) -> float:
    """Return the bytes of activations that one device keeps for the backward pass.

    0 for a network that is no transformer, of which nothing is known.
    """
    network = job.experiment.model.backbone
    if not isinstance(network, Transformer):
        return 0.0
    dims = network.dims()
    widths = dims.periods + dims.depth * KEPT_WIDTHS.get(remat or network.remat, 0)
    microbatches = job.experiment.optimizer.grad_accum_steps
    return _token_bytes(job, mesh, clips) / microbatches * widths


def _token_bytes(job: Job, mesh: Mesh, clips: int) -> float:
    """Return the bytes of all tokens of one device, each of the network's width."""
    network = job.experiment.model.backbone
    parts = mesh.shape["context"] * mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = math.prod(network.grid(job.clip))
    return tokens * network.dims().width * jnp.dtype(network.dtype).itemsize * clips / parts


def bytes_sent(job: Job, mesh: Mesh, clips: int | None = None) -> float:
    """Return a rough number of bytes that a device sends in one training step.

    Weights are gathered twice where fsdp splits them, gradients are summed, and tokens are
    exchanged over context and tensor.
    """
    state, _, frozen = _arguments(job, mesh)
    network = job.experiment.model.backbone
    parts = mesh.shape
    total = 0.0

    # Weights, gathered for the forward and the backward pass, and their gradients.
    trained = bytes_per_device(state.params)
    if parts["fsdp"] > 1:
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((state.params, frozen)))
        gathered = 2 * jnp.dtype(network.dtype).itemsize * weights / parts["tensor"]
        total += gathered + trained * parts["fsdp"]
    if parts["data"] > 1:
        total += 2 * trained  # an all-reduce sends there and back

    # Tokens, in the forward pass and twice in the backward pass.
    if isinstance(network, Transformer):
        times = 0
        if parts["tensor"] > 1:
            times += 6  # three sums a block, each sent there and back
        if parts["context"] > 1:
            times += 4  # queries, keys, values and the result

        total += 3 * times * network.dims().depth * _token_bytes(job, mesh, clips or job.clips)

    return total
