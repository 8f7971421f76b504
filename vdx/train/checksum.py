"""Fingerprints of arrays: proof that a checkpoint gives back the saved bits.

A file that is damaged on disk can be read without an error and give other values. A
fingerprint is computed on the devices, from the bits and their places, and is the same number
on every mesh.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdx.parallel import path_str
from vdx.types import Array

__all__ = ["Leaf", "describe", "digest", "fingerprint", "fingerprints", "whole_digest"]

Leaf = tuple[list[int], str, int]  # shape, dtype, fingerprint


def _bits(x: Array) -> Array:
    """Return the bits of every element, uint32 of x's shape, one to one."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    same_width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, same_width).astype(jnp.uint32)


def _flat_index(shape: tuple[int, ...]) -> Array:
    """Return the row-major index of every element, uint32 of this shape.

    It is built axis by axis: flattening would move a sharded array between devices.
    """
    index = jnp.uint32(0)
    stride = 1
    for axis in reversed(range(len(shape))):
        iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + iota * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def fingerprint(x: Array) -> Array:
    """Return the wrap-around sum (uint32) of all elements' bits, mixed with indices.

    For a fixed index the mixing is a bijection (the finalizer of MurmurHash3, Appleby 2011),
    so any change of one element changes the sum.
    """
    bits = _bits(x)
    h = bits ^ (_flat_index(bits.shape) * np.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)).sum(dtype=jnp.uint32)


@jax.jit
def _all_fingerprints(leaves: list[Array]) -> Array:
    """Return the fingerprints of arrays as one array, which every device holds whole."""
    out = jnp.stack([fingerprint(x) for x in leaves])
    if jax.sharding.get_abstract_mesh().empty:
        return out
    return jax.lax.with_sharding_constraint(out, jax.sharding.PartitionSpec())


def fingerprints(tree: Any) -> dict[str, int]:
    """Return {path: fingerprint} of every leaf of a tree.

    Call under the mesh over which the arrays are sharded.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    values = np.asarray(_all_fingerprints(list(leaves))).tolist()
    return dict(zip(map(path_str, paths), values, strict=True))


def describe(tree: Any) -> dict[str, Leaf]:
    """Return {path: (shape, dtype, fingerprint)}, as checkpoints keep it in JSON."""
    found = fingerprints(tree)
    return {
        path_str(path): (list(leaf.shape), str(leaf.dtype), found[path_str(path)])
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def digest(value: Mapping | list) -> str:
    """Return the sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def whole_digest(tree: Any) -> str:
    """Return one digest of all arrays of a tree, the same on every mesh."""
    return digest(describe(tree))
