"""Attention on a mesh."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vdx.parallel import BATCH
from vdx.types import Array


def _over(size: int, *axes: str) -> tuple[str, ...] | None:
    """The mesh axes, if they divide an axis of this size."""
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
    return axes if parts > 1 and size % parts == 0 else None


def _gather(
    run: Callable[..., Array], q: Array, k: Array, v: Array, mask: Array | None, causal: bool
) -> Array:
    """run(q, k, v, mask) on every device's clips, heads and queries, with all keys."""
    queries = q.ndim == 4  # the axis after b is theirs
    batch, heads = _over(len(q), *BATCH), _over(q.shape[-2], "tensor")
    along = None if queries and causal else _over(q.shape[1], "context")
    here = P(batch, along, *[None] * (q.ndim - 4), heads)
    there = P(batch, None, heads) if queries else here
    hides = (
        P()
        if mask is None
        else P(batch if len(mask) > 1 else None, along if queries and mask.ndim == 3 else None)
    )
    return jax.shard_map(
        run, in_specs=(here, there, there, hides), out_specs=here, check_vma=False
    )(q, k, v, mask)


def _split(run: Callable[..., Array], q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """run(q, k, v, mask) on every device's clips, heads and tokens, queries and keys alike."""
    tokens = q.shape[1]
    fill = -tokens % jax.sharding.get_abstract_mesh().shape["context"]
    if fill:  # keys that nobody sees
        q, k, v = (jnp.pad(a, ((0, 0), (0, fill), (0, 0), (0, 0))) for a in (q, k, v))
        mask = jnp.ones((1, tokens), bool) if mask is None else mask
        mask = jnp.pad(mask, ((0, 0), (0, fill)))
    batch = _over(len(q), *BATCH)
    here = P(batch, "context", _over(q.shape[2], "tensor"))
    hides = P() if mask is None else P(batch if len(mask) > 1 else None, "context")
    y = jax.shard_map(run, in_specs=(here, here, here, hides), out_specs=here, check_vma=False)(
        q, k, v, mask
    )
    return y[:, :tokens]
