"""Attention on a mesh: each device attends for its own clips, heads and queries.

An axis is split where the mesh axis divides it; otherwise each device computes all of it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vdx.parallel import BATCH
from vdx.types import Array, Bool, Float

# attend(q [b ... q n d], k and v [b ... s n d], mask) on one device's share
Attend = Callable[[Array, Array, Array, Array | None], Array]


def mesh_axes_for(size: int, *axes: str) -> tuple[str, ...] | None:
    """Return the mesh axes, or None if they do not divide an axis of this size."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1 or size % parts:
        return None
    return axes


def attend_to_gathered(
    attend: Attend,
    q: Float[Array, "b *more q n d"],
    k: Float[Array, "b *more s n d"],
    v: Float[Array, "b *more s n d"],
    mask: Bool[Array, "c s"] | Bool[Array, "c q s"] | None,
    causal: bool,
) -> Float[Array, "b *more q n d"]:
    """Attend on every device for its clips, heads and queries, to all keys.

    The mesh axis `context` splits the axis after b: the queries or, with more of the batch after
    b, the first axis of that. Causal queries are not split, because a mask counts them from 0.
    """
    batch = mesh_axes_for(len(q), *BATCH)
    second = mesh_axes_for(q.shape[1], "context")
    heads = mesh_axes_for(q.shape[-2], "tensor")
    second_is_queries = q.ndim == 4
    if second_is_queries and causal:
        second = None

    # Keys are split like queries, but not along their tokens.
    of_queries = P(batch, second, *[None] * (q.ndim - 4), heads)
    of_keys = of_queries
    if second_is_queries:
        of_keys = P(batch, None, heads)

    # A mask is split along its clips and, if it has them, its queries.
    of_mask = _mask_spec(mask, batch)
    if mask is not None and mask.ndim == 3 and second_is_queries:
        of_mask = P(*of_mask, second)

    return jax.shard_map(
        attend,
        in_specs=(of_queries, of_keys, of_keys, of_mask),
        out_specs=of_queries,
        check_vma=False,
    )(q, k, v, mask)


def attend_to_split(
    attend: Attend,
    q: Float[Array, "b l n d"],
    k: Float[Array, "b l n d"],
    v: Float[Array, "b l n d"],
    mask: Bool[Array, "c l"] | None,
) -> Float[Array, "b l n d"]:
    """Attend on every device for its clips, heads and tokens.

    Keys are split like queries. `attend` must exchange keys between devices, as the rows of
    CONTEXTS do.
    """
    # Fill up with keys that the mask hides.
    tokens = q.shape[1]
    missing = -tokens % jax.sharding.get_abstract_mesh().shape["context"]
    if missing:
        q, k, v = (jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) for a in (q, k, v))
        if mask is None:
            mask = jnp.ones((1, tokens), bool)
        mask = jnp.pad(mask, ((0, 0), (0, missing)))

    # One layout for queries, keys and values.
    batch = mesh_axes_for(len(q), *BATCH)
    of_tokens = P(batch, "context", mesh_axes_for(q.shape[2], "tensor"))
    of_mask = _mask_spec(mask, batch)
    if mask is not None:
        of_mask = P(*of_mask, "context")

    y = jax.shard_map(
        attend,
        in_specs=(of_tokens, of_tokens, of_tokens, of_mask),
        out_specs=of_tokens,
        check_vma=False,
    )(q, k, v, mask)
    return y[:, :tokens]


def _mask_spec(mask: Array | None, batch: tuple[str, ...] | None) -> P:
    """Return the sharding of a mask's first axis: one entry, or one for each clip."""
    if mask is None:
        return P()
    return P(batch if len(mask) > 1 else None)
