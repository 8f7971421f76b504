"""T5 encoders (Raffel et al. 2020): UMT5, which Wan reads its prompts with, and T5 v1.1.

They are T5 v1.1 in form (Shazeer 2020: gated tanh-GELU, no biases): an RMS norm before each
part, attention without the scale 1 / sqrt(d), and a bias for the distance between two tokens in
place of positions. UMT5 (Chung et al. 2023) learns that bias in every layer, T5 once for all.
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


def distance_buckets(length: int, buckets: int = 32, farthest: int = 128) -> np.ndarray:
    """int32 [q k]: the bucket of the distance k - q (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. Of each half, the first half are for one
    distance each, the rest grow geometrically up to `farthest`; what lies beyond is in the last.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = np.abs(distance)
    # In float32, as every implementation: elsewhere a distance on a border would move over it.
    steps = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(math.log(farthest / exact)) * (half - exact)
    coarse = np.minimum(exact + steps.astype(np.int32), half - 1)
    return (np.where(far < exact, far, coarse) + half * (distance > 0)).astype(np.int32)


class DistanceBias(nn.Module):
    """A learned number for each head and bucket: buckets [q k] -> bias [1 n q k], float32."""

    heads: int
    buckets: int

    @nn.compact
    def __call__(self, bucket: Int[Array, "q k"]) -> Float[Array, "1 n q k"]:
        table = self.param(
            "table", nn.initializers.normal(0.1), (self.buckets, self.heads), jnp.float32
        )
        bias = jnp.take(table.astype(jnp.float32), bucket, axis=0)
        return constrain(jnp.moveaxis(bias, -1, 0)[None], "b n q k")


class Layer(nn.Module):
    """Attention and the gated MLP, each a residual; `nn.scan` repeats it over the depth."""

    heads: int
    head_width: int
    hidden: int
    buckets: int
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "b l"],
        bucket: Int[Array, "l l"],
        bias: Float[Array, "1 n l l"] | None,
    ):
        width, split = x.shape[-1], (*x.shape[:2], self.heads, self.head_width)

        def dense(features: int, name: str):
            return nn.Dense(features, use_bias=False, name=name, dtype=self.dtype)

        if bias is None:
            bias = DistanceBias(self.heads, self.buckets, name="distance")(bucket)
        y = RMSNorm(self.eps, name="norm_a")(x)
        q, k, v = (
            constrain(dense(self.heads * self.head_width, name)(y).reshape(split), "b l n d")
            for name in "qkv"
        )
        y = attend(q, k, v, mask, bias=bias, scale=1.0)
        x = x + dense(width, "out")(y.reshape(*x.shape[:2], -1))

        y = RMSNorm(self.eps, name="norm_b")(x)
        y = ACTIVATIONS["gelu"](dense(self.hidden, "gate_up")(y)) * dense(self.hidden, "up")(y)
        x = x + dense(width, "down")(constrain(y, "b l f"))
        return constrain(x, "b l d"), None


class T5Encoder(nn.Module):
    """ids int32 [b l], mask bool [b l] -> features float32 [b l d]; the mask is True on tokens.

    Features of padding are not meaningful. shared_bias: one bias of the first layer serves all
    (T5 v1.1), else each layer has its own (UMT5). buckets, farthest: see `distance_buckets`.
    dtype: compute type of the matrix products; what runs through the layers stays float32,
    because its few large features lose the small ones in bfloat16.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    head_width: int
    hidden: int
    shared_bias: bool = False
    buckets: int = 32
    farthest: int = 128
    eps: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        # Looked up in the parameter's own type, or the whole vocabulary would be converted.
        x = nn.Embed(self.vocabulary, self.width, name="words")(ids).astype(jnp.float32)
        x = constrain(x, "b l d")
        bucket = jnp.asarray(distance_buckets(ids.shape[1], self.buckets, self.farthest))
        bias = None
        if self.shared_bias:
            bias = DistanceBias(self.heads, self.buckets, name="distance")(bucket)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        x, _ = layers(
            self.heads,
            self.head_width,
            self.hidden,
            self.buckets,
            self.eps,
            jnp.dtype(self.dtype),
            name="layers",
        )(x, mask, bucket, bias)
        return RMSNorm(self.eps, name="norm")(x)
