"""Layers over the frames of a clip, for the autoencoders and the U-Nets."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.parallel import constrain
from vdx.types import Array, DTypeLike, Float


class GroupNorm(nn.Module):
    """Group normalisation of each frame, or of all frames of a clip at once.

    Computed in float32, returned in the input's dtype.
    """

    groups: int  # of neighbouring channels that share a mean and a variance
    eps: float = 1e-6
    joint: bool = False  # normalise the frames of a clip [b t h w c] together

    @nn.compact
    def __call__(self, x: Float[Array, "... h w c"]) -> Float[Array, "... h w c"]:
        """Normalise and scale the channels of `x`."""
        first_axis = -4 if self.joint else -3
        norm = nn.GroupNorm(
            self.groups,
            epsilon=self.eps,
            dtype=jnp.float32,
            # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
            use_fast_variance=False,
            name="norm",
            reduction_axes=tuple(range(first_axis, 0)),
        )
        return norm(x.astype(jnp.float32)).astype(x.dtype)


class ImageResidual(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, plus a shortcut.

    A projection of the embedding, if there is one, is added between the convolutions.
    """

    features: int  # channels of the output
    groups: int  # of the group norms
    dtype: DTypeLike  # of the matrix products
    eps: float = 1e-6  # of the group norms
    joint: bool = False  # normalise the frames of a clip [b t h w c] together

    @nn.compact
    def __call__(
        self, x: Float[Array, "... h w c"], emb: Float[Array, "... 1 1 d"] | None = None
    ) -> Float[Array, "... h w f"]:
        """Apply the block. `emb` embeds the time of each clip, or of each frame."""
        y = nn.silu(GroupNorm(self.groups, self.eps, self.joint, name="norm1")(x))
        y = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv1")(y)
        if emb is not None:
            y = y + nn.Dense(self.features, name="emb", dtype=self.dtype)(nn.silu(emb))

        y = nn.silu(GroupNorm(self.groups, self.eps, self.joint, name="norm2")(y))
        y = nn.Conv(self.features, (3, 3), dtype=self.dtype, name="conv2")(y)

        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="shortcut", dtype=self.dtype)(x)
        return x + y


def down_conv(features: int, dtype: DTypeLike, name: str, before: int = 0) -> nn.Conv:
    """Return a 2D convolution that halves frames [... h w c].

    It pads one pixel below and to the right, and `before` pixels above and to the left.
    """
    return nn.Conv(features, (3, 3), 2, [(before, 1)] * 2, dtype=dtype, name=name)


def upsample_nearest(x: Float[Array, "... h w c"]) -> Float[Array, "... H W c"]:
    """Double the height and the width: each pixel becomes a square of four."""
    return jnp.repeat(jnp.repeat(x, 2, -3), 2, -2)


def split_space(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
    """Shard frames in space over the mesh's `context` axis.

    Rows are sharded, or columns where the rows do not divide, or neither where none divides (the
    deepest levels of small frames).
    """
    parts = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    height, width = x.shape[2:4]
    if height % parts == 0:
        letter = "h"
    elif width % parts == 0:
        letter = "w"
    else:
        letter = ""
    return constrain(x, "b t h w c", context=letter)
