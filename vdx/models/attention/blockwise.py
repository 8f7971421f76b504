"""Exact attention in blocks of queries, in plain JAX: what it holds grows with the tokens, and not
with their square (Rabe & Staats 2021; the backward pass from saved sums, Dao et al. 2022).

Rows are the heads of clips: q [r q d], k and v [r s d]. A CPU takes one row and a few hundred
queries at a time, so that their scores stay in its cache; an accelerator as many rows as SCORES
allows. Products are summed in float32 and their operands keep the inputs' type, in the backward
pass too, because only then a CPU multiplies bfloat16 natively.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from vdx.parallel import platform

BLOCK = 2**20  # scores of one row that are computed at a time
SCORES = 2**25  # of all rows, on an accelerator
HIDDEN = -1e30  # a score that is not seen: finite, so that no difference of two is NaN
SAVED = "attention"  # the name of what a checkpoint policy may save: answers and their sums

_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _size(queries: int, keys: int) -> int:
    """Queries in a block."""
    most = min(max(BLOCK // keys, 128), 512)
    return -(-queries // -(-queries // most))


def _over_rows(f, rows: tuple, size: int):
    """f over the rows of arrays [r ...], as many at a time as may be."""
    at_once = 1 if platform() == "cpu" else max(1, SCORES // (size * rows[2].shape[1]))
    at_once = min(at_once, len(rows[1]))
    return lax.map(lambda row: f(*row), rows, batch_size=at_once if at_once > 1 else None)


def _cut(x: Array, size: int) -> Array:
    """[q ...] -> [blocks size ...], the last filled up with zeros."""
    x = jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def _join(x: Array, queries: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:queries]


class _Row:
    """One row, block by block; `which` is its entry of `seen` [m 1 s] or [m q s]."""

    def __init__(self, k: Array, seen: Array | None, which: Array, causal: bool, size: int):
        self.k, self.causal, self.size = k, causal, size
        self.seen = None if seen is None else seen[which]
        self.each = self.seen is not None and len(self.seen) > 1  # each query sees others

    def blocks(self, *arrays: Array) -> tuple[Array, ...]:
        """What a scan takes: of each block its number, queries, other arrays [q ...] and mask."""
        cut = [_cut(a, self.size) for a in arrays]
        masks = [] if self.seen is None or not self.each else [_cut(self.seen, self.size)]
        return (jnp.arange(len(cut[0])), *cut, *masks)

    def scores(self, block: Array, q: Array, seen: list[Array]) -> tuple[Array, Array | None]:
        """Scores [q s] of a block, before they are scaled, and where they are seen (None: all)."""
        mask = seen[0] if self.each else self.seen
        if self.causal:
            before = (block * self.size + jnp.arange(self.size))[:, None] >= jnp.arange(len(self.k))
            mask = before if mask is None else mask & before
        x = _dot("qd,sd->qs", q, self.k)
        return x if mask is None else jnp.where(mask, x, HIDDEN), mask


def forward(
    q: Float[Array, "r q d"],
    k: Float[Array, "r s d"],
    v: Float[Array, "r s d"],
    seen: Bool[Array, "m 1 s"] | Bool[Array, "m q s"] | None,
    scale: float,
    causal: bool = False,
) -> tuple[Float[Array, "r q d"], Float[Array, "r q"]]:
    """Answers and the logarithms of the sums of exp(score), float32. m divides r: an entry of
    `seen` serves r / m rows."""
    queries, size = q.shape[1], _size(q.shape[1], k.shape[1])

    def row(which: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        one = _Row(k, seen, which, causal, size)

        def step(_, block):
            number, q, *mask = block
            x, _ = one.scores(number, q, mask)
            most = x.max(-1, keepdims=True)
            # The barrier: or XLA would compute all exponentials again for their sum.
            p = lax.optimization_barrier(jnp.exp((x - most) * scale))
            total = p.sum(-1, keepdims=True)
            y = _dot("qs,sd->qd", p.astype(v.dtype), v) / total
            return None, (y, (most * scale + jnp.log(total))[:, 0])

        y, sums = lax.scan(step, None, one.blocks(q))[1]
        return _join(y, queries), _join(sums, queries)

    return _over_rows(row, (_which(q, seen), q, k, v), size)


def backward(
    q: Float[Array, "r q d"],
    k: Float[Array, "r s d"],
    v: Float[Array, "r s d"],
    seen: Array | None,
    y: Float[Array, "r q d"],
    sums: Float[Array, "r q"],
    dy: Float[Array, "r q d"],
    scale: float,
    causal: bool = False,
) -> tuple[Array, Array, Array]:
    """Float32 cotangents of q, k and v from that of y. `y` and `sums` may be those over more keys
    than k: then these are the shares of k's."""
    queries, size = q.shape[1], _size(q.shape[1], k.shape[1])
    inner = (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum(-1)

    def row(which: Array, q: Array, k: Array, v: Array, dy: Array, sums: Array, inner: Array):
        one = _Row(k, seen, which, causal, size)

        def step(grads, block):
            number, q, dy, sums, inner, *mask = block
            x, visible = one.scores(number, q, mask)
            p = jnp.exp(x * scale - sums[:, None])
            dx = p * (_dot("qd,sd->qs", dy, v) - inner[:, None])
            if visible is not None:
                dx = jnp.where(visible, dx, 0.0)
            p, dx = lax.optimization_barrier((p.astype(q.dtype), dx.astype(q.dtype)))
            # [d s], so that neither p nor dx need be transposed.
            dk, dv = grads[0] + _dot("qd,qs->ds", q, dx), grads[1] + _dot("qd,qs->ds", dy, p)
            return (dk, dv), _dot("qs,sd->qd", dx, k) * scale

        zero = jnp.zeros(k.shape[::-1], jnp.float32)
        (dk, dv), dq = lax.scan(step, (zero, zero), one.blocks(q, dy, sums, inner))
        return _join(dq, queries), dk.T * scale, dv.T

    return _over_rows(row, (_which(q, seen), q, k, v, dy, sums, inner), size)


def _which(q: Array, seen: Array | None) -> Array:
    """[r]: the entry of `seen` for each row."""
    return jnp.arange(len(q)) // (1 if seen is None else len(q) // len(seen))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blockwise(
    q: Float[Array, "r q d"],
    k: Float[Array, "r s d"],
    v: Float[Array, "r s d"],
    seen: Array | None,
    scale: float,
    causal: bool,
) -> Float[Array, "r q d"]:
    """`forward` without the sums, with a backward pass that is as sparing."""
    return _forward(q, k, v, seen, scale, causal)[0]


def _forward(q, k, v, seen, scale, causal):
    y, sums = forward(q, k, v, seen, scale, causal)
    y, sums = checkpoint_name(y.astype(q.dtype), SAVED), checkpoint_name(sums, SAVED)
    return y, (q, k, v, seen, y, sums)


def _backward(scale, causal, saved, dy):
    q, k, v, seen, y, sums = saved
    dq, dk, dv = backward(q, k, v, seen, y, sums, dy, scale, causal)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise.defvjp(_forward, _backward)
