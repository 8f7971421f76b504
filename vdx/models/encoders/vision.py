"""Image encoders that are trained with the denoiser.

Frozen ones are in vdx/models/encoders/clip.py.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from vdx.config.build import ConfigError
from vdx.config.ranges import Count, Index
from vdx.models.attention.layers import encoder_layers
from vdx.models.patches import low_frequencies
from vdx.types import Array, Float


class PatchEncoder(nn.Module):
    """A small vision transformer: one feature vector per patch.

    Reference: Dosovitskiy et al. 2021.
    """

    patch: Count = 8  # side of a patch, in pixels
    width: Count = 96  # features of a patch
    depth: Index = 1  # layers
    heads: Count = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b m d"]:
        """Encode images in [-1, 1]. Raises ConfigError if the patches do not tile them."""
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ConfigError(
                f"An image of {x.shape[1:3]} (h, w) does not divide into patches of "
                f"{self.patch}; set the encoder's patch."
            )

        x = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)
        basis = low_frequencies((1, self.patch, self.patch))
        x = nn.Dense(self.width, name="patch", kernel_init=basis)(x)
        positions = self.param(
            "position_table", nn.initializers.normal(0.02), x.shape[1:], jnp.float32
        )
        return encoder_layers(x + positions[None], None, self.depth, self.heads)


VISION: dict[str, Callable[..., nn.Module]] = {"patches": PatchEncoder}
