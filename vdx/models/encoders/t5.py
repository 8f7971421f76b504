"""T5 encoders (Raffel et al. 2020): UMT5, which reads Wan's prompts, and T5 v1.1.

Both have the form of T5 v1.1 (Shazeer 2020: gated tanh-GELU, no biases). There is an RMS norm
before each part, and attention lacks the scale 1 / sqrt(d). A bias for the distance between two
tokens takes the place of positions. UMT5 (Chung et al. 2023) learns that bias in every layer, T5
once for all layers.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vdx.models.attention.backends import attend
from vdx.models.layers import ACTIVATIONS, RMSNorm
from vdx.parallel import constrain
from vdx.types import Array, Bool, DTypeLike, Float, Int

_XXL: dict[str, Any] = dict(width=4096, depth=24, heads=64, head_width=64, hidden=10240)
# Fields of T5Encoder: T5Encoder(**SIZES["umt5-xxl"]).
SIZES: dict[str, dict[str, Any]] = {
    "umt5-xxl": _XXL | dict(vocabulary=256384),
    "t5-v1.1-xxl": _XXL | dict(vocabulary=32128, shared_bias=True),
}


def distance_buckets(
    length: int, buckets: int = 32, farthest: int = 128
) -> Int[np.ndarray, "length length"]:
    """Return the bucket of every distance k - q, int32 [q k].

    The rule is that of Raffel et al. 2020, section 2.1. Half of the buckets are for keys after the
    query. In each half, the first half of the buckets hold one distance each, and the rest grow
    geometrically up to `farthest`. Larger distances are in the last one.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    far = np.abs(distance)
    half = buckets // 2
    exact = buckets // 4
    # In float32, like every implementation: otherwise a distance on a border would cross it.
    steps = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(math.log(farthest / exact)) * (half - exact)
    coarse = np.minimum(exact + steps.astype(np.int32), half - 1)
    bucket = np.where(far < exact, far, coarse)
    return (bucket + half * (distance > 0)).astype(np.int32)


class DistanceBias(nn.Module):
    """A learned number for each head and bucket, in float32."""

    heads: int
    buckets: int

    @nn.compact
    def __call__(self, bucket: Int[Array, "q k"]) -> Float[Array, "1 n q k"]:
        """Look up the bias of every query and key."""
        table = self.param(
            "table", nn.initializers.normal(0.1), (self.buckets, self.heads), jnp.float32
        )
        bias = jnp.take(table.astype(jnp.float32), bucket, axis=0)  # [q k n]
        return constrain(jnp.moveaxis(bias, -1, 0)[None], "b n q k")


class Layer(nn.Module):
    """Attention and the gated MLP, each a residual.

    `nn.scan` repeats the layer over the depth.
    """

    heads: int
    head_width: int
    hidden: int  # features inside the MLP
    buckets: int  # of the distances
    eps: float  # of the norms
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"],
        bucket: Int[Array, "l l"],
        bias: Float[Array, "1 n l l"] | None,
    ) -> tuple[Float[Array, "b l d"], None]:
        """Return (features, None), the form that `nn.scan` carries on.

        bias: of a shared table; None: the layer has its own.
        """
        if bias is None:
            bias = DistanceBias(self.heads, self.buckets, name="distance")(bucket)
        x = x + self._attention(RMSNorm(self.eps, name="norm_a")(x), mask, bias)
        x = x + self._mlp(RMSNorm(self.eps, name="norm_b")(x))
        return constrain(x, "b l d"), None

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, use_bias=False, name=name, dtype=self.dtype)

    def _attention(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"], bias: Float[Array, "1 n l l"]
    ) -> Float[Array, "b l d"]:
        batch, length, width = x.shape
        split = (batch, length, self.heads, self.head_width)
        features = self.heads * self.head_width
        q, k, v = (
            constrain(self._dense(features, name)(x).reshape(split), "b l n d") for name in "qkv"
        )
        y = attend(q, k, v, mask, bias=bias, scale=1.0)
        return self._dense(width, "out")(y.reshape(batch, length, -1))

    def _mlp(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        gate = ACTIVATIONS["gelu"](self._dense(self.hidden, "gate_up")(x))
        h = gate * self._dense(self.hidden, "up")(x)
        return self._dense(x.shape[-1], "down")(constrain(h, "b l f"))


class T5Encoder(nn.Module):
    """Token ids to float32 features. Features of padding are not meaningful."""

    vocabulary: int
    width: int  # d
    depth: int  # layers
    heads: int
    head_width: int
    hidden: int  # features inside the MLPs
    shared_bias: bool = False  # one bias for all layers (T5 v1.1), else one for each (UMT5)
    buckets: int = 32  # see `distance_buckets`
    farthest: int = 128  # see `distance_buckets`
    eps: float = 1e-6  # of the norms
    # Of the matrix products. The residual stream stays float32, because its few large features
    # lose the small ones in bfloat16.
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        """Encode token ids; `mask` is True on tokens."""
        # Looked up in the parameter's own type, or the whole vocabulary would be converted.
        x = nn.Embed(self.vocabulary, self.width, name="words")(ids).astype(jnp.float32)
        x = constrain(x, "b l d")

        # [l l], and the bias that all layers share, if they do.
        bucket = jnp.asarray(distance_buckets(ids.shape[1], self.buckets, self.farthest))
        bias = None
        if self.shared_bias:
            bias = DistanceBias(self.heads, self.buckets, name="distance")(bucket)

        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            check_constancy_invariants=False,  # it would trace the body twice
        )
        layers = scanned(
            self.heads,
            self.head_width,
            self.hidden,
            self.buckets,
            self.eps,
            jnp.dtype(self.dtype),
            name="layers",
        )

        # [b l d]
        x, _ = layers(x, mask, bucket, bias)
        return RMSNorm(self.eps, name="norm")(x)
