"""What the image autoencoder and the U-Nets are made of: group norm, a residual of convolutions."""

import flax.linen as nn
import jax.numpy as jnp

from vdx.types import Array, DTypeLike, Float


class GroupNorm(nn.Module):
    """Normalises groups of channels [... h w c] of each frame, or (`joint`) of all frames of a clip
    [b t h w c] at once, in float32, returned in the input's dtype."""

    groups: int
    eps: float = 1e-6
    joint: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... h w c"]) -> Array:
        # Not the fast variance E[x^2] - E[x]^2: it cancels where the mean is large.
        return nn.GroupNorm(
            self.groups,
            epsilon=self.eps,
            dtype=jnp.float32,
            use_fast_variance=False,
            name="norm",
            reduction_axes=tuple(range(-4 if self.joint else -3, 0)),
        )(x.astype(jnp.float32)).astype(x.dtype)


class ImageResidual(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, beside a shortcut; with an embedding,
    of time, a projection of it is added between them."""

    features: int
    groups: int
    dtype: DTypeLike
    eps: float = 1e-6

    @nn.compact
    def __call__(
        self, x: Float[Array, "... h w c"], emb: Float[Array, "... 1 1 d"] | None = None
    ) -> Array:
        y = x
        for i in (1, 2):
            y = nn.silu(GroupNorm(self.groups, self.eps, name=f"norm{i}")(y))
            y = nn.Conv(self.features, (3, 3), dtype=self.dtype, name=f"conv{i}")(y)
            if emb is not None and i == 1:
                y = y + nn.Dense(self.features, name="emb", dtype=self.dtype)(nn.silu(emb))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="shortcut", dtype=self.dtype)(x)
        return x + y
