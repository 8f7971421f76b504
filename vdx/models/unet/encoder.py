"""The way down and the middle of a U-Net, which its control branch has as well."""

from typing import NamedTuple

import flax.linen as nn

from vdx.models.image_blocks import down_conv
from vdx.models.layers import EmbedMLP, add_vector
from vdx.models.unet.blocks import BlockConfig, TimeTransformer, layer_class
from vdx.parallel import constrain
from vdx.types import Array, Bool, Float


class Conditions(NamedTuple):
    """Inputs of a U-Net besides the clip."""

    time: Float[Array, "b"] | Float[Array, "b t"]  # of each clip, or of each frame
    vector: Float[Array, "b d"] | Float[Array, "b t d"] | None  # added to the embedded time
    tokens: Float[Array, "b l e"] | None  # of the text
    mask: Bool[Array, "b l"] | None  # True on tokens, None if all are


class Encoded(NamedTuple):
    """The results of `Encoder`."""

    emb: Float[Array, "b _ 1 1 d"]  # the embedded time, of the clip or of each frame
    skips: list[Array]  # features [b t h w c] after each layer on the way down
    deepest: Float[Array, "b t h w c"]  # features after the middle

    def plus(self, skips: list[Array], deepest: Array) -> "Encoded":
        """Add the results of a control branch."""
        summed = [a + b for a, b in zip(self.skips, skips, strict=True)]
        return Encoded(self.emb, summed, self.deepest + deepest)


class Encoder(nn.Module):
    """The way down and the middle."""

    widths: tuple[int, ...]  # features of each level
    layers: int  # in each level
    attention: tuple[bool, ...]  # levels with attention
    motion_middle: bool  # the middle has a motion module
    remat: str  # a row of REMAT
    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        conditions: Conditions,
        hint: Float[Array, "b t h w d"] | None = None,
    ) -> Encoded:
        """Encode a clip. `hint` is added to the output of the first convolution."""
        emb = self._embed_time(conditions, x.shape[1])
        x = self._stem(x, hint)
        skips = self._down(x, emb, conditions)
        deepest = self._middle(skips[-1], emb, conditions)
        return Encoded(emb, skips, deepest)

    def _embed_time(self, conditions: Conditions, frames: int) -> Float[Array, "b _ 1 1 d"]:
        first = self.widths[0]
        emb = EmbedMLP(4 * first, sinusoid=first, name="time")(conditions.time)
        if conditions.vector is not None:
            emb = add_vector(emb, conditions.vector, frames)
        return emb.reshape(len(emb), -1, 1, 1, emb.shape[-1])

    def _stem(
        self, x: Float[Array, "b t h w c"], hint: Float[Array, "b t h w d"] | None
    ) -> Float[Array, "b t h w d"]:
        """Apply the first convolution, the hint and the first motion module."""
        config = self.config
        first = self.widths[0]
        x = nn.Conv(first, (3, 3), dtype=config.dtype, name="conv_in")(x)
        if hint is not None:
            x = x + hint
        x = constrain(x, "b t h w c", context="t")

        if config.temporal.convs:
            head_width = config.head_width or first // config.heads
            width = config.heads * head_width
            x = TimeTransformer(config.heads, width, config, name="motion_in")(x)
        return x

    def _down(
        self,
        x: Float[Array, "b t h w c"],
        emb: Float[Array, "b _ 1 1 d"],
        conditions: Conditions,
    ) -> list[Array]:
        """Return the features before the first level and after every layer of all levels."""
        layer = layer_class(self.remat)
        skips = [x]
        for i, (width, attention) in enumerate(zip(self.widths, self.attention, strict=True)):
            motion = self.config.temporal.has_motion(attention)
            for j in range(self.layers):
                block = layer(width, attention, motion, self.config, name=f"down_{i}_{j}")
                x = block(x, emb, conditions.tokens, conditions.mask)
                skips.append(x)
            if i < len(self.widths) - 1:
                x = down_conv(width, self.config.dtype, f"down_{i}_conv", before=1)(x)
                skips.append(x)
        return skips

    def _middle(
        self,
        x: Float[Array, "b t h w c"],
        emb: Float[Array, "b _ 1 1 d"],
        conditions: Conditions,
    ) -> Float[Array, "b t h w c"]:
        """Apply a layer with attention, and one without."""
        layer = layer_class(self.remat)
        width = self.widths[-1]
        for j, attention in enumerate((True, False)):
            motion = self.config.temporal.motion and attention and self.motion_middle
            block = layer(width, attention, motion, self.config, name=f"middle_{j}")
            x = block(x, emb, conditions.tokens, conditions.mask)
        return x
