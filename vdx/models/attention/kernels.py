"""The implementations of attention on one device, with one signature.

Each maps q [b q n d], k and v [b s n d], a mask [c s] or [c q s] (c is 1 or b), a bias [1 n q s],
a scale and `causal` to [b q n d].
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from vdx.models.attention.blockwise import SAVED, blockwise
from vdx.parallel import platform
from vdx.types import Array, Bool, Float

Q = Float[Array, "b q n d"]
KV = Float[Array, "b s n d"]
Mask = Bool[Array, "c s"] | Bool[Array, "c q s"] | None
Bias = Float[Array, "1 n q s"] | None


def xla_attention(q: Q, k: KV, v: KV, mask: Mask, bias: Bias, scale: float, causal: bool) -> Q:
    """Attend with all scores written out, by the compiler."""
    y = jax.nn.dot_product_attention(
        q, k, v, bias, _with_heads(mask), scale=scale, is_causal=causal
    )
    return checkpoint_name(y, SAVED)


def blockwise_attention(
    q: Q, k: KV, v: KV, mask: Mask, bias: Bias, scale: float, causal: bool
) -> Q:
    """Attend in blocks of queries, in plain JAX; there is no bias."""
    rows = (rearrange(a, "b s n d -> (b n) s d") for a in (q, k, v))
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None]
    y = blockwise(*rows, mask, scale, causal)
    return rearrange(y, "(b n) q d -> b q n d", b=len(q))


def cudnn_attention(q: Q, k: KV, v: KV, mask: Mask, bias: Bias, scale: float, causal: bool) -> Q:
    """Attend by a kernel of NVIDIA's library; there is no bias."""
    mask = _with_heads(mask)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (len(mask), 1, q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(
        q, k, v, None, mask, scale=scale, is_causal=causal, implementation="cudnn"
    )


def splash_attention(q: Q, k: KV, v: KV, mask: Mask, bias: Bias, scale: float, causal: bool) -> Q:
    """Attend by a Pallas kernel for TPUs.

    There is no bias, and one mask for all queries.
    """
    queries, block_q = _tiles(q.shape[1], q.shape[-1])
    keys, block_k = _tiles(k.shape[1], q.shape[-1])

    kernel = _splash_kernel(q.shape[2], queries, keys, block_q, block_k, causal)
    segments = _visible_segment(mask, len(q), queries, keys, k.shape[1])
    y = jax.vmap(kernel)(
        _pad_tokens((q * scale).astype(q.dtype), queries),
        _pad_tokens(k, keys),
        _pad_tokens(v, keys),
        segments,
    )
    return rearrange(y[:, :, : q.shape[1]], "b n q d -> b q n d")


def _with_heads(mask: Mask) -> Array | None:
    """Give a mask the axes [c 1 q s] or [c 1 1 s]."""
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[:, None]
    return mask[:, None]


def _splash_kernel(
    heads: int, queries: int, keys: int, block_q: int, block_k: int, causal: bool
) -> Callable[..., Array]:
    """Build the kernel for padded sizes.

    It holds arrays, so each trace builds its own.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # The backward passes use the blocks of the forward pass.
    inner = math.gcd(block_k, 512)
    mask_class = splash.CausalMask if causal else splash.FullMask
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask_class((queries, keys))] * heads),
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


def _visible_segment(
    mask: Mask, batch: int, queries: int, keys: int, real_keys: int
) -> tuple[Array, Array] | None:
    """Return segment ids that put all queries and the visible keys in one segment.

    None if every key is visible and none is padding.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if mask is None and keys == real_keys:
        return None
    visible = mask
    if visible is None:
        visible = jnp.ones((1, real_keys), bool)
    visible = jnp.pad(visible, ((0, 0), (0, keys - real_keys))).astype(jnp.int32)
    return splash.SegmentIds(
        jnp.ones((batch, queries), jnp.int32), jnp.broadcast_to(visible, (batch, keys))
    )


def _pad_tokens(x: Float[Array, "b s n d"], size: int) -> Float[Array, "b n S d"]:
    """Move the heads before the tokens, and pad the tokens to `size`."""
    x = rearrange(x, "b s n d -> b n s d")
    return jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)))


def _tiles(length: int, width: int) -> tuple[int, int]:
    """Return (padded length, block): equal blocks as large as the vector memory holds."""
    step = 256
    if length <= 512:
        step = 128
    largest = 1024
    if width > 128:
        largest = 512
    blocks = -(-length // largest)
    block = -(-length // (blocks * step)) * step
    return -(-length // block) * block, block
