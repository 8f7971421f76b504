"""Attention as one function, computed by the backend that suits the device.

All backends are exact. `BACKENDS`, at the bottom, states the limits of each. "auto" takes the
first one that is able, of those preferred on the platform that the program is compiled for;
`selected_backends` reports the choice. On several devices each attends for its own clips, heads
and queries.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AxisType

from vdx.config.build import ConfigError, lookup
from vdx.models.attention.context_parallel import ring, ulysses
from vdx.models.attention.kernels import (
    blockwise_attention,
    cudnn_attention,
    splash_attention,
    xla_attention,
)
from vdx.models.attention.sharding import attend_to_gathered, attend_to_split
from vdx.parallel import platform
from vdx.types import Array, Bool, Float

SMALL = 128 * 128  # queries x keys; up to here "auto" writes the scores out
_SELECTED: dict[str, None] = {}  # a set in the order of insertion


def attend(
    q: Float[Array, "b *more q n d"],
    k: Float[Array, "b *more s n d"],
    v: Float[Array, "b *more s n d"],
    mask: Bool[Array, "c s"] | Bool[Array, "c q s"] | None = None,
    *,
    bias: Float[Array, "1 n q s"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
    context: str = "gather",
) -> Float[Array, "b *more q n d"]:
    """Compute softmax(scale q k^T + bias) v, the softmax in float32.

    On a mesh b is split over data and fsdp, n over tensor, and the axis after b, of queries or of
    more of the batch, over context, where they divide.

    Args:
        mask: True on visible keys, for all queries [c s] or for each [c q s], where c is 1 or b.
            Each query must have one visible key or more.
        scale: 1 / sqrt(d) if None.
        causal: hide the keys after each query.
        backend: "auto" or a row of BACKENDS; context: a row of CONTEXTS. Raises ConfigError if
            they do not support the call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = None if mask is None else jnp.asarray(mask)

    spec = AttentionSpec.of(q, k, mask, bias, causal)
    name = select_backend(spec, backend)
    _log_selection(spec, name)
    on_one_device = partial(_attend_on_one_device, name, bias=bias, scale=scale, causal=causal)

    # On one device, or inside of shard_map.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return on_one_device(q, k, v, mask)

    # Queries and keys are both split.
    exchange = lookup(context, CONTEXTS, "model.context")
    if exchange is not None and mesh.shape["context"] > 1:
        _check_tokens_may_be_split(context, spec, q, k)
        return attend_to_split(partial(exchange, on_one_device, scale=scale), q, k, v, mask)

    # Each device has all keys; the compiler splits its own attention by itself.
    if name == "xla":
        return on_one_device(q, k, v, mask)
    return attend_to_gathered(on_one_device, q, k, v, mask, causal)


def _attend_on_one_device(
    name: str,
    q: Float[Array, "b *more q n d"],
    k: Float[Array, "b *more s n d"],
    v: Float[Array, "b *more s n d"],
    mask: Bool[Array, "c s"] | Bool[Array, "c q s"] | None,
    *,
    bias: Float[Array, "1 n q s"] | None,
    scale: float,
    causal: bool,
) -> Float[Array, "b *more q n d"]:
    """Run a backend with the axes of the batch joined."""
    # A mask of each clip is repeated for the other axes of the batch.
    rows = math.prod(q.shape[:-3])
    if mask is not None and len(mask) not in (1, rows):
        mask = jnp.repeat(mask, rows // len(mask), 0)
    flat = (a.reshape(rows, *a.shape[-3:]) for a in (q, k, v))
    return BACKENDS[name].run(*flat, mask, bias, scale, causal).reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """A call of `attend`, for the choice of its backend."""

    queries: int  # of one clip
    keys: int
    width: int  # features of a head
    dtype: str = "float32"
    mask: int = 0  # axes of the mask: 2 for [c s], 3 for [c q s], 0 for none
    bias: bool = False
    causal: bool = False
    platform: str = "cpu"  # "cpu", "gpu" or "tpu"

    @classmethod
    def of(
        cls, q: Array, k: Array, mask: Array | None, bias: Array | None, causal: bool
    ) -> "AttentionSpec":
        """Return the spec of a call on the current platform."""
        return cls(
            queries=q.shape[-3],
            keys=k.shape[-3],
            width=q.shape[-1],
            dtype=str(q.dtype),
            mask=0 if mask is None else mask.ndim,
            bias=bias is not None,
            causal=causal,
            platform=platform(),
        )


def select_backend(spec: AttentionSpec, backend: str = "auto") -> str:
    """Return the row of BACKENDS that computes a call.

    Raises:
        ConfigError: the named backend does not support the call.
    """
    if backend != "auto":
        reason = lookup(backend, BACKENDS, "model.attention").unsupported(spec)
        if reason:
            raise ConfigError(
                f"model.attention = {backend!r} {reason}. Here: {spec}. 'auto' takes a "
                "backend that can."
            )
        return backend

    # "auto": small scores are written out; else the first backend that is able.
    if spec.queries * spec.keys <= SMALL:
        return "xla"
    for name in PREFERRED.get(spec.platform, ()):
        if not BACKENDS[name].unsupported(spec):
            return name
    return "xla"


def selected_backends() -> list[str]:
    """Return one line for each selection in the programs that are traced so far."""
    return list(_SELECTED)


def _log_selection(spec: AttentionSpec, name: str) -> None:
    """Log a selection, once."""
    line = f"{spec.queries} queries, {spec.keys} keys of {spec.width} in {spec.dtype}: {name}"
    if line not in _SELECTED:
        _SELECTED[line] = None
        logging.info("Attention on %s, %s", spec.platform, line)


def _check_tokens_may_be_split(context: str, spec: AttentionSpec, q: Array, k: Array) -> None:
    """Check that all tokens attend to one another.

    Raises:
        ConfigError: they are not, so the keys must be gathered.
    """
    same_tokens = q.ndim == 4 and q.shape[1] == k.shape[1]
    if not same_tokens or spec.causal or spec.bias or spec.mask == 3:
        raise ConfigError(
            f"model.context = {context!r} is for tokens that all attend to one another. "
            f"Here: {spec}. 'gather' can compute it."
        )


def _blockwise_unsupported(spec: AttentionSpec) -> str:
    if spec.bias:
        return "adds no bias"
    return ""


def _cudnn_unsupported(spec: AttentionSpec) -> str:
    if spec.platform != "gpu":
        return "needs a GPU"
    if spec.dtype not in ("bfloat16", "float16") or spec.width > 128 or spec.width % 8:
        return "takes bfloat16 or float16, and heads of at most 128, a multiple of 8"
    if spec.bias:
        return "adds no bias"
    # A mask becomes a bias, and cuDNN has the gradient of a bias for even sizes alone.
    if spec.mask and (spec.queries % 2 or spec.keys % 2):
        return "with a mask takes even numbers of queries and keys"
    return ""


def _splash_unsupported(spec: AttentionSpec) -> str:
    if spec.bias or spec.mask == 3:
        return "adds no bias and has one mask for all queries"
    return ""


@dataclasses.dataclass(frozen=True)
class Backend:
    """An implementation of attention on one device, and its limits."""

    run: Callable[..., Array]  # a function of vdx.models.attention.kernels
    unsupported: Callable[[AttentionSpec], str]  # the reason why it cannot compute a call, or ""


BACKENDS: dict[str, Backend] = {
    # Writes out all scores, on any device.
    "xla": Backend(xla_attention, lambda spec: ""),
    # In blocks, in plain JAX, on any device.
    "blockwise": Backend(blockwise_attention, _blockwise_unsupported),
    # A kernel for GPUs, of NVIDIA's library.
    "cudnn": Backend(cudnn_attention, _cudnn_unsupported),
    # A Pallas kernel for TPUs; interpreted on other devices, for tests.
    "splash": Backend(splash_attention, _splash_unsupported),
}
# The order in which "auto" tries backends, where scores are not small.
PREFERRED: Mapping[str, tuple[str, ...]] = {
    "cpu": ("blockwise",),
    "gpu": ("cudnn", "blockwise"),
    "tpu": ("splash", "blockwise"),
}
# The way in which queries that are split over the mesh axis `context` meet their keys.
CONTEXTS: dict[str, Callable[..., Array] | None] = {
    # Each device gathers all keys and values.
    "gather": None,
    # Functions of a device's share of the tokens:
    "ulysses": ulysses,
    "ring": ring,
}
