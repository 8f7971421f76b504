"""Control branches of a U-Net: a copy of its way down that reads a map of what is to be drawn.

References: Zhang et al. 2023, ControlNet; Guo et al. 2023, SparseCtrl; `ControlNetModel` and
`SparseControlNetModel` of diffusers.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vdx.models.unet.blocks import Common, Encoder, Temporal
from vdx.parallel import constrain
from vdx.types import Array, DTypeLike, Float

# What lies between the frames of a branch. "image": it also reads the noisy clip. "sparse": it
# reads maps of some frames alone, a last channel of which says which ones these are.
CONTROLS: dict[str, Temporal] = {
    "image": Temporal(motion=False),
    "sparse": Temporal(attentions=1),
}


class Hint(nn.Module):
    """A map as large as the clip times 2^(len(widths) - 1), at the size and width of the clip's
    features, which at first is nothing. No widths: one convolution, for a map of its size."""

    widths: tuple[int, ...]
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t H W c"]) -> Float[Array, "b t h w d"]:
        def conv(features: int, name: str, stride: int = 1, init: Any = None) -> nn.Conv:
            return nn.Conv(
                features,
                (3, 3),
                stride,
                1,
                dtype=self.dtype,
                name=name,
                kernel_init=init or nn.initializers.lecun_normal(),
            )

        zeros = nn.initializers.zeros
        if not self.widths:
            return conv(self.features, "conv_in", init=zeros)(x)
        x = nn.silu(conv(self.widths[0], "conv_in")(x))
        for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            x = nn.silu(conv(width, f"conv_{2 * i}")(x))
            x = nn.silu(conv(wider, f"conv_{2 * i + 1}", stride=2)(x))
            x = constrain(x, "b t h w c", context="t")
        return conv(self.features, "conv_out", init=zeros)(x)


class ControlNet(nn.Module):
    """What is added to a U-Net's (skips, deepest features), at first nothing.

    kind: a row of CONTROLS. hint: widths of the map's convolutions. The rest is as in Encoder.
    """

    kind: str
    hint: tuple[int, ...]
    widths: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    remat: str
    common: Common

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        time: Array,
        vector: Array | None,
        tokens: Array | None,
        mask: Array | None,
        control: Float[Array, "b t H W k"],
        scale: Float[Array, "b"],
    ) -> tuple[list[Array], Array]:
        common = dataclasses.replace(self.common, temporal=CONTROLS[self.kind])
        hint = Hint(self.hint, self.widths[0], common.dtype, name="hint")(control)
        x = jnp.zeros_like(x) if self.kind == "sparse" else x
        _, skips, deepest = Encoder(
            self.widths, self.layers, self.attention, False, self.remat, common, name="encoder"
        )(x, time, vector, tokens, mask, hint)

        def out(y: Array, name: str) -> Array:
            y = nn.Dense(
                y.shape[-1], name=name, dtype=common.dtype, kernel_init=nn.initializers.zeros
            )(y)
            return y * scale.astype(y.dtype)[:, None, None, None, None]

        return [out(y, f"out_{i}") for i, y in enumerate(skips)], out(deepest, "out_middle")
