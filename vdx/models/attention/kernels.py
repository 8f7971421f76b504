"""The implementations of attention."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from vdx.models.attention.blockwise import SAVED, blockwise
from vdx.parallel import platform
from vdx.types import Array


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
