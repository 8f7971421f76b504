"""Attention as one function, computed by the backend that suits the device and the sizes.

All are exact. `BACKENDS`, at the bottom, says what each can do; "auto" takes the first that can of
those preferred on the platform that the program is compiled for, and `chosen` says what it took.
On several devices each attends for its own clips, heads and queries.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from absl import logging
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from vdx.config.build import ConfigError, lookup
from vdx.models.attention.blockwise import SAVED, blockwise
from vdx.models.attention.context_parallel import ring, ulysses
from vdx.parallel import BATCH, platform
from vdx.types import Array, Bool, Float

SMALL = 128 * 128  # queries x keys, up to which the scores are simply written out
_CHOSEN: dict[str, None] = {}


def attend(
    q: Float[Array, "b ... q n d"],
    k: Float[Array, "b ... s n d"],
    v: Float[Array, "b ... s n d"],
    mask: Bool[Array, "#b s"] | Bool[Array, "#b q s"] | None = None,
    *,
    bias: Float[Array, "1 n q s"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
    context: str = "gather",
) -> Float[Array, "b ... q n d"]:
    """softmax(scale q k^T + bias) v; `mask` is True on keys that may be seen, by all queries
    or, [b q s] (b may be 1), by each. Each query sees one key or more.

    The scale is 1 / sqrt(d) unless given; `causal` hides the keys after each query. Softmax runs
    in float32. On a mesh b is split over data and fsdp, n over tensor, and the axis after b, be
    it the queries or more of the batch, over context, where they divide. backend: "auto" or a row
    of BACKENDS. context: a row of CONTEXTS, how queries that are split meet their keys. Raises
    ConfigError where these cannot do it.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if mask is None else jnp.asarray(mask)
    spec = AttentionSpec(
        q.shape[-3],
        k.shape[-3],
        q.shape[-1],
        str(q.dtype),
        0 if mask is None else mask.ndim,
        bias is not None,
        causal,
        platform(),
    )
    name = select_backend(spec, backend)
    _note(spec, name)

    def flat(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        rows = math.prod(q.shape[:-3])
        if mask is not None and len(mask) not in (1, rows):
            mask = jnp.repeat(mask, rows // len(mask), 0)
        args = (a.reshape(rows, *a.shape[-3:]) for a in (q, k, v))
        return BACKENDS[name].run(*args, mask, bias, scale, causal).reshape(q.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return flat(q, k, v, mask)
    meet = lookup(context, CONTEXTS, "model.context")
    if meet is not None and mesh.shape["context"] > 1:
        if q.ndim != 4 or q.shape[1] != k.shape[1] or causal or spec.bias or spec.mask == 3:
            raise ConfigError(
                f"model.context = {context!r} is for tokens that all see the same, "
                f"one another. Here: {spec}. 'gather' can do it."
            )
        return _split(partial(meet, flat, scale=scale), q, k, v, mask)
    if name == "xla":  # which the compiler splits by itself
        return flat(q, k, v, mask)
    return _gather(flat, q, k, v, mask, causal)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What is asked of a backend. mask: its axes, 2 for [b s], 3 for [b q s], 0 for none."""

    queries: int
    keys: int
    width: int
    dtype: str = "float32"
    mask: int = 0
    bias: bool = False
    causal: bool = False
    platform: str = "cpu"


def select_backend(spec: AttentionSpec, backend: str = "auto") -> str:
    """The row of BACKENDS that does it. Raises ConfigError if the one that is named cannot."""
    if backend != "auto":
        why = lookup(backend, BACKENDS, "model.attention").unsupported(spec)
        if why:
            raise ConfigError(
                f"model.attention = {backend!r} {why}. Here: {spec}. 'auto' takes a "
                "backend that can."
            )
        return backend
    if spec.queries * spec.keys <= SMALL:
        return "xla"
    return next(
        (name for name in PREFERRED.get(spec.platform, ()) if not BACKENDS[name].unsupported(spec)),
        "xla",
    )


def selected_backends() -> list[str]:
    """What the programs that this process has traced so far attend with, in words."""
    return list(_CHOSEN)


def _note(spec: AttentionSpec, name: str) -> None:
    line = f"{spec.queries} queries, {spec.keys} keys of {spec.width} in {spec.dtype}: {name}"
    if line not in _CHOSEN:
        _CHOSEN[line] = None
        logging.info("Attention on %s, %s", spec.platform, line)


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


def _xla(q, k, v, mask, bias, scale, causal) -> Array:
    mask = None if mask is None else mask[:, None] if mask.ndim == 3 else mask[:, None, None]
    y = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, is_causal=causal)
    return checkpoint_name(y, SAVED)


def _blockwise(q, k, v, mask, bias, scale, causal) -> Array:
    rows = (rearrange(a, "b s n d -> (b n) s d") for a in (q, k, v))
    seen = mask[:, None] if mask is not None and mask.ndim == 2 else mask
    return rearrange(blockwise(*rows, seen, scale, causal), "(b n) q d -> b q n d", b=len(q))


def _cudnn(q, k, v, mask, bias, scale, causal) -> Array:
    if mask is not None:
        mask = jnp.broadcast_to(
            mask[:, None] if mask.ndim == 3 else mask[:, None, None],
            (len(mask), 1, q.shape[1], k.shape[1]),
        )
    return jax.nn.dot_product_attention(
        q, k, v, None, mask, scale=scale, is_causal=causal, implementation="cudnn"
    )


def _cudnn_lacks(spec: AttentionSpec) -> str:
    if spec.platform != "gpu":
        return "needs a GPU"
    if spec.dtype not in ("bfloat16", "float16") or spec.width > 128 or spec.width % 8:
        return "takes bfloat16 or float16, and heads of at most 128, a multiple of 8"
    if spec.bias:
        return "adds no bias"
    # A mask becomes a bias, whose gradient cuDNN has for even sizes.
    odd = spec.mask and (spec.queries % 2 or spec.keys % 2)
    return "with a mask takes even numbers of queries and keys" if odd else ""


def _splash(q, k, v, mask, bias, scale, causal) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (queries, block_q), (keys, block_k) = (_tiles(a.shape[1], q.shape[-1]) for a in (q, k))
    inner = math.gcd(block_k, 512)
    hides = (splash.CausalMask if causal else splash.FullMask)((queries, keys))
    # Made anew in every trace: it holds arrays.
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([hides] * q.shape[2]),
        residual_checkpoint_name=SAVED,
        interpret=platform() != "tpu",
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_kv_compute=inner,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_kv_dkv_compute=inner,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
    )
    segments = None
    if mask is not None or keys != k.shape[1]:  # all that is seen is one segment
        seen = jnp.ones((1, k.shape[1]), bool) if mask is None else mask
        seen = jnp.pad(seen, ((0, 0), (0, keys - k.shape[1]))).astype(jnp.int32)
        segments = splash.SegmentIds(
            jnp.ones((len(q), queries), jnp.int32), jnp.broadcast_to(seen, (len(q), keys))
        )

    def tiled(x: Array, size: int) -> Array:
        return jnp.pad(
            rearrange(x, "b s n d -> b n s d"), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0))
        )

    y = jax.vmap(kernel)(
        tiled((q * scale).astype(q.dtype), queries), tiled(k, keys), tiled(v, keys), segments
    )
    return rearrange(y[:, :, : q.shape[1]], "b n q d -> b q n d")


def _tiles(length: int, width: int) -> tuple[int, int]:
    """(padded length, block): equal blocks as large as the vector memory holds."""
    step, most = 128 if length <= 512 else 256, 1024 if width <= 128 else 512
    block = -(-length // (-(-length // most) * step)) * step
    return -(-length // block) * block, block


@dataclasses.dataclass(frozen=True)
class Backend:
    """run(q, k, v [b s n d], mask, bias, scale, causal) -> [b q n d] on one device, and
    lacks(ask) -> why it cannot do that, or ""."""

    run: Callable[..., Array]
    unsupported: Callable[[AttentionSpec], str]


BACKENDS: dict[str, Backend] = {
    # Writes out all scores. The compiler's own, on any device.
    "xla": Backend(_xla, lambda spec: ""),
    # In blocks, in plain JAX, on any device.
    "blockwise": Backend(_blockwise, lambda spec: "adds no bias" if spec.bias else ""),
    # A kernel for GPUs, of NVIDIA's library.
    "cudnn": Backend(_cudnn, _cudnn_lacks),
    # A Pallas kernel for TPUs; elsewhere interpreted, for tests.
    "splash": Backend(
        _splash,
        lambda spec: (
            "adds no bias and has one mask for all queries" if spec.bias or spec.mask == 3 else ""
        ),
    ),
}
# What "auto" tries, in this order, where scores are not small.
PREFERRED: Mapping[str, tuple[str, ...]] = {
    "cpu": ("blockwise",),
    "gpu": ("cudnn", "blockwise"),
    "tpu": ("splash", "blockwise"),
}
# How queries that are split over the mesh axis `context` meet their keys: None, each device has
# all keys and values, else a function of a device's share of the tokens.
CONTEXTS: dict[str, Callable[..., Array] | None] = {
    "gather": None,
    "ulysses": ulysses,
    "ring": ring,
}
