"""Control branches of a U-Net: copies of its way down that read a map.

The map shows what to generate. References: Zhang et al. 2023, ControlNet; Guo et al. 2023,
SparseCtrl; `ControlNetModel` and `SparseControlNetModel` of diffusers.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vdx.models.unet.blocks import BlockConfig, zero_dense
from vdx.models.unet.encoder import Conditions, Encoder
from vdx.models.unet.temporal import Temporal
from vdx.parallel import constrain
from vdx.types import Array, DTypeLike, Float


class Hint(nn.Module):
    """Convolutions that bring a map to the size and the width of the clip's features.

    The map is 2^(len(widths) - 1) times as high and wide as the clip. Without widths there is one
    convolution, for a map of the clip's size. The result is zero at first.
    """

    widths: tuple[int, ...]  # features of each size, finest first
    features: int  # of the result
    dtype: DTypeLike  # of the products

    @nn.compact
    def __call__(self, x: Float[Array, "b t H W c"]) -> Float[Array, "b t h w d"]:
        """Apply the convolutions."""
        if not self.widths:
            return self._zero_conv("conv_in")(x)

        x = nn.silu(self._conv(self.widths[0], "conv_in")(x))
        for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            x = nn.silu(self._conv(width, f"conv_{2 * i}")(x))
            x = nn.silu(self._conv(wider, f"conv_{2 * i + 1}", stride=2)(x))
            x = constrain(x, "b t h w c", context="t")
        return self._zero_conv("conv_out")(x)

    def _conv(self, features: int, name: str, stride: int = 1) -> nn.Conv:
        return nn.Conv(features, (3, 3), stride, 1, dtype=self.dtype, name=name)

    def _zero_conv(self, name: str) -> nn.Conv:
        zeros = nn.initializers.zeros
        return nn.Conv(self.features, (3, 3), 1, 1, dtype=self.dtype, name=name, kernel_init=zeros)


class ControlNet(nn.Module):
    """A branch whose results are added to a U-Net's skips and deepest features.

    Fresh, they are zero.
    """

    kind: str  # a row of CONTROLS
    hint: tuple[int, ...]  # widths of the map's convolutions
    # As in Encoder.
    widths: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    remat: str
    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        conditions: Conditions,
        control: Float[Array, "b t H W m"],
        scale: Float[Array, "b"],
    ) -> tuple[list[Array], Float[Array, "b t i j d"]]:
        """Return what is added to (skips, deepest features), multiplied by `scale`."""
        config = dataclasses.replace(
            self.config, temporal=CONTROLS[self.kind], joint_residual_norm=False
        )
        # [b t H W m] -> [b t h w d]
        hint = Hint(self.hint, self.widths[0], config.dtype, name="hint")(control)
        # SparseCtrl does not read the noisy clip.
        if self.kind == "sparse":
            x = jnp.zeros_like(x)

        encoder = Encoder(
            self.widths,
            self.layers,
            self.attention,
            motion_middle=False,
            remat=self.remat,
            config=config,
            name="encoder",
        )
        encoded = encoder(x, conditions, hint)

        # Each result passes a projection of its own.
        skips = [self._scaled(y, f"out_{i}", scale) for i, y in enumerate(encoded.skips)]
        return skips, self._scaled(encoded.deepest, "out_middle", scale)

    def _scaled(
        self, x: Float[Array, "b t h w d"], name: str, scale: Float[Array, "b"]
    ) -> Float[Array, "b t h w d"]:
        """Project features by a matrix that is zero at first."""
        y = zero_dense(x.shape[-1], name, self.config.dtype)(x)
        return y * scale.astype(y.dtype)[:, None, None, None, None]


# The layers between the frames of a branch. "image": the branch also reads the noisy clip.
# "sparse": it reads maps of some frames alone, whose last channel marks these frames.
CONTROLS: dict[str, Temporal] = {
    "image": Temporal(motion=False),
    "sparse": Temporal(attentions=1),
}
