"""Exact attention in blocks of queries, in plain JAX.

Its memory grows with the number of tokens, not with its square (Rabe & Staats 2021; the backward
pass from saved sums, Dao et al. 2022).

Rows are the heads of clips: q [r q d], k and v [r s d]. A CPU takes one row and a few hundred
queries at a time, so that their scores stay in its cache. An accelerator takes as many rows as
SCORES allows. Products are summed in float32 and their operands keep the inputs' type, in the
backward pass too, because only then a CPU multiplies bfloat16 natively.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from vdx.parallel import platform
from vdx.types import Array, Bool, Float, Int

BLOCK = 2**20  # scores of one row that are computed at a time
SCORES = 2**25  # scores of all rows that an accelerator computes at a time
HIDDEN = -1e30  # a hidden score; finite, so that no difference of two is NaN
SAVED = "attention"  # the checkpoint name of results and of the sums of the softmax

Mask = Bool[Array, "m 1 s"] | Bool[Array, "m q s"] | None

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def forward(
    q: Float[Array, "r q d"],
    k: Float[Array, "r s d"],
    v: Float[Array, "r s d"],
    mask: Mask,
    scale: float,
    causal: bool = False,
) -> tuple[Float[Array, "r q d"], Float[Array, "r q"]]:
    """Return the results and the logarithms of the sums of exp(score), float32.

    m divides r: an entry of the mask serves r / m rows.
    """
    queries = q.shape[1]
    size = _block_size(queries, k.shape[1])

    def attend_row(entry: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        row = _Row(k, mask, entry, causal, size)

        def attend_block(_: None, block: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
            number, q, *block_mask = block
            scores, _visible = row.scores(number, q, block_mask)

            # The softmax, from scores less their largest.
            largest = scores.max(-1, keepdims=True)
            # Without the barrier XLA would compute all exponentials again for their sum.
            p = lax.optimization_barrier(jnp.exp((scores - largest) * scale))
            total = p.sum(-1, keepdims=True)
            y = _dot("qs,sd->qd", p.astype(v.dtype), v) / total
            return None, (y, (largest * scale + jnp.log(total))[:, 0])

        y, sums = lax.scan(attend_block, None, row.blocks(q))[1]
        return _join_blocks(y, queries), _join_blocks(sums, queries)

    return _map_rows(attend_row, (_mask_entries(q, mask), q, k, v), size)


def backward(
    q: Float[Array, "r q d"],
    k: Float[Array, "r s d"],
    v: Float[Array, "r s d"],
    mask: Mask,
    y: Float[Array, "r q d"],
    sums: Float[Array, "r q"],
    dy: Float[Array, "r q d"],
    scale: float,
    causal: bool = False,
) -> tuple[Float[Array, "r q d"], Float[Array, "r s d"], Float[Array, "r s d"]]:
    """Return the cotangents of q, k and v from that of y, float32.

    `y` and `sums` may be over more keys than k. The cotangents are then the shares of these keys.
    """
    queries = q.shape[1]
    size = _block_size(queries, k.shape[1])
    inner = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(-1)  # r q

    def differentiate_row(
        entry: Array, q: Array, k: Array, v: Array, dy: Array, sums: Array, inner: Array
    ) -> tuple[Array, Array, Array]:
        row = _Row(k, mask, entry, causal, size)

        def differentiate_block(
            grads: tuple[Array, Array], block: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], Array]:
            number, q, dy, sums, inner, *block_mask = block
            scores, visible = row.scores(number, q, block_mask)

            # The softmax again, and the cotangent of the scaled scores.
            p = jnp.exp(scores * scale - sums[:, None])
            dx = p * (_dot("qd,sd->qs", dy, v) - inner[:, None])
            if visible is not None:
                dx = jnp.where(visible, dx, 0.0)
            p, dx = lax.optimization_barrier((p.astype(q.dtype), dx.astype(q.dtype)))

            # [d s], so that neither p nor dx need be transposed.
            dk = grads[0] + _dot("qd,qs->ds", q, dx)
            dv = grads[1] + _dot("qd,qs->ds", dy, p)
            return (dk, dv), _dot("qs,sd->qd", dx, k) * scale

        zero = jnp.zeros(k.shape[::-1], jnp.float32)
        blocks = row.blocks(q, dy, sums, inner)
        (dk, dv), dq = lax.scan(differentiate_block, (zero, zero), blocks)
        return _join_blocks(dq, queries), dk.T * scale, dv.T

    rows = (_mask_entries(q, mask), q, k, v, dy, sums, inner)
    return _map_rows(differentiate_row, rows, size)


class _Row:
    """The keys and the mask of one row, read block by block of queries."""

    def __init__(self, k: Array, mask: Mask, entry: Array, causal: bool, size: int) -> None:
        self.k = k  # [s d]
        self.causal = causal
        self.size = size  # queries in a block
        self.mask = None
        if mask is not None:
            self.mask = mask[entry]  # [1 s] or [q s]
        self.mask_of_each = self.mask is not None and len(self.mask) > 1  # one for each query

    def blocks(self, *arrays: Array) -> tuple[Array, ...]:
        """Return the inputs of a scan over blocks.

        Each block has its number, its part of the arrays [q ...], and of a mask of each query.
        """
        parts = [_cut_blocks(a, self.size) for a in arrays]
        if self.mask is not None and self.mask_of_each:
            parts.append(_cut_blocks(self.mask, self.size))
        return (jnp.arange(len(parts[0])), *parts)

    def scores(
        self, block: Array, q: Float[Array, "q d"], block_mask: list[Array]
    ) -> tuple[Float[Array, "q s"], Bool[Array, "..."] | None]:
        """Return the scores of a block before they are scaled, and its mask."""
        mask = self.mask
        if self.mask_of_each:
            (mask,) = block_mask
        if self.causal:
            # Keys up to the query, of those that the mask shows.
            query = (block * self.size + jnp.arange(self.size))[:, None]
            not_later = query >= jnp.arange(len(self.k))[None]
            mask = not_later if mask is None else mask & not_later

        scores = _dot("qd,sd->qs", q, self.k)
        if mask is not None:
            scores = jnp.where(mask, scores, HIDDEN)
        return scores, mask


def _block_size(queries: int, keys: int) -> int:
    """Return the queries in a block, from 128 to 512, fewer with many keys."""
    most = min(max(BLOCK // keys, 128), 512)
    blocks = -(-queries // most)
    return -(-queries // blocks)


def _map_rows(f: Callable[..., Any], rows: tuple[Array, ...], size: int) -> Any:
    """Map f over the rows of arrays [r ...], as many at a time as the device allows."""
    _, q, k, *_ = rows
    at_once = min(SCORES // (size * k.shape[1]), len(q))
    if platform() == "cpu" or at_once <= 1:
        return lax.map(lambda row: f(*row), rows)
    return lax.map(lambda row: f(*row), rows, batch_size=at_once)


def _cut_blocks(x: Array, size: int) -> Array:
    """Cut [q ...] into [blocks size ...]; the last block is filled up with zeros."""
    x = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def _join_blocks(x: Array, queries: int) -> Array:
    """Join [blocks size ...] to [q ...], the inverse of `_cut_blocks`."""
    return x.reshape(-1, *x.shape[2:])[:queries]


def _mask_entries(q: Float[Array, "r q d"], mask: Mask) -> Int[Array, "r"]:
    """Return the entry of the mask for each row."""
    entries = len(q) if mask is None else len(mask)
    return jnp.arange(len(q)) // (len(q) // entries)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise(
    q: Float[Array, "r q d"],
    k: Float[Array, "r s d"],
    v: Float[Array, "r s d"],
    mask: Mask,
    scale: float,
    causal: bool,
) -> Float[Array, "r q d"]:
    """Compute `forward` without the sums, with a backward pass that saves memory too."""
    return _forward(q, k, v, mask, scale, causal)[0]


def _forward(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, causal: bool
) -> tuple[Array, tuple[Any, ...]]:
    y, sums = forward(q, k, v, mask, scale, causal)
    y = checkpoint_name(y.astype(q.dtype), SAVED)
    sums = checkpoint_name(sums, SAVED)
    return y, (q, k, v, mask, y, sums)


def _backward(
    scale: float, causal: bool, saved: tuple[Any, ...], dy: Array
) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, y, sums = saved
    dq, dk, dv = backward(q, k, v, mask, y, sums, dy, scale, causal)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise.defvjp(_forward, _backward)
