"""Blocks of the transformer."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vdx.config.build import build
from vdx.models.attention.layers import CrossAttention
from vdx.models.layers import MLP, LayerNorm, layer_norm
from vdx.models.mixers.context import MixContext
from vdx.models.mixers.table import MIXERS
from vdx.parallel import constrain
from vdx.types import Array, Float, Ports

# Whether cross-attention is normalised, its input and its queries and keys, and is in every block.
CROSS = {
    "normed": True,  # Wan
    "plain": False,  # PixArt-alpha and Latte: in no block over time alone
}


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    return layer_norm(x) * (1 + scale) + shift


def mixer_of(spec: Mapping[str, Any], heads: int = 1) -> Any:
    """The free-standing mixer of a spec. Raises ConfigError for one that cannot be."""
    return build(spec, MIXERS, "model.pattern", heads=heads, dtype=jnp.float32, parent=None)


class Block(nn.Module):
    """One mixer, cross-attention to the text, one MLP, each a residual.

    An image, a clip of one frame, passes a block over time alone by (Latte's
    enable_temporal_attentions = False), so that images train and test the other blocks.
    """

    mixer: Mapping[str, Any]
    heads: int
    hidden: int
    activation: str
    cross: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        modulation: Float[Array, "b t 6 d"],
        ports: Ports,
        context: MixContext,
    ) -> Float[Array, "b t h w d"]:
        x = checkpoint_name(x, "residual")
        mixer = build(
            self.mixer,
            MIXERS,
            "model.pattern",
            heads=self.heads,
            dtype=self.dtype,
            name=self.mixer["name"],
        )
        if (
            mixer.temporal
            and x.shape[1] == 1
            and context.past is None
            and not self.is_initializing()
        ):
            return x
        table = self.param("table", nn.initializers.zeros, (6, x.shape[-1]), jnp.float32)
        rows = (modulation + table)[:, :, None, None]  # b t 1 1 6 d
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows[..., i, :] for i in range(6))

        y = mixer(modulate(x, shift1, scale1).astype(self.dtype), context)
        x = (x + gate1 * y).astype(x.dtype)
        normed = CROSS[self.cross]
        if ports.tokens is not None and (normed or not mixer.temporal):
            cross = CrossAttention(self.heads, self.dtype, normed, context.attention, name="cross")
            x = x + cross(
                LayerNorm(name="cross_norm")(x) if normed else x,
                ports.tokens,
                ports.tokens_mask,
                ports.image_tokens,
            )
        y = MLP(self.hidden, self.activation, self.dtype, name="mlp")(
            modulate(x, shift2, scale2).astype(self.dtype)
        )
        x = (x + gate2 * y).astype(x.dtype)
        return constrain(x, "b t h w d", context="t")


class Period(nn.Module):
    """One pass through the pattern; `nn.scan` repeats it over the depth.

    Control tokens (Jiang et al. 2025, VACE) pass through a block of their own, and a projection
    of them is added to the clip's after the first block. Positions of frames [t 1 1 d] are added
    once, before the first block over time alone (Latte).
    """

    pattern: tuple[Mapping[str, Any], ...]
    block: dict

    @nn.compact
    def __call__(self, carry, modulation, ports, context):
        x, control, frames = carry
        for i, mixer in enumerate(self.pattern):
            if frames is not None and mixer_of(mixer).temporal:
                x, frames = x + frames, jnp.zeros_like(frames)
            x = Block(mixer, **self.block, name=f"block_{i}")(x, modulation, ports, context)
            if control is not None and i == 0:
                control = Block(mixer, **self.block, name="control")(
                    control, modulation, ports, context
                )
                hint = nn.Dense(
                    x.shape[-1], name="hint", dtype=x.dtype, kernel_init=nn.initializers.zeros
                )(control)
                scale = ports.control_scale[:, None, None, None, None]
                x = (x + scale * hint).astype(x.dtype)
        return (x, control, frames), None
