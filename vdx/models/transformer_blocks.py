"""The blocks of the transformer, and one pass through a pattern of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vdx.config.build import build
from vdx.models.attention.layers import CrossAttention
from vdx.models.layers import MLP, LayerNorm, layer_norm
from vdx.models.mixers.context import MixContext, Mixer
from vdx.models.mixers.table import MIXERS
from vdx.models.remat import RESIDUAL
from vdx.parallel import constrain
from vdx.types import Array, DTypeLike, Float, Ports

Spec = Mapping[str, Any]  # {"name": row of MIXERS, **fields}


class TransformerDims(NamedTuple):
    """The resolved dimensions of a transformer."""

    width: int  # features of a token
    depth: int  # blocks
    heads: int  # of attention
    pattern: tuple[Spec, ...]  # specs of MIXERS

    @property
    def periods(self) -> int:
        """Return how often the pattern is repeated."""
        return self.depth // len(self.pattern)

    @property
    def head_width(self) -> int:
        """Return the features of a head."""
        return self.width // self.heads


class CrossStyle(NamedTuple):
    """The form of cross-attention in a network."""

    normed: bool  # normalise its input, and its queries and keys
    in_temporal_blocks: bool  # also in blocks whose mixer works over time alone


CROSS = {
    "normed": CrossStyle(normed=True, in_temporal_blocks=True),  # Wan
    "plain": CrossStyle(normed=False, in_temporal_blocks=False),  # PixArt-alpha and Latte
}


def modulate(
    x: Float[Array, "b t h w d"],
    shift: Float[Array, "b #t 1 1 d"],
    scale: Float[Array, "b #t 1 1 d"],
) -> Float[Array, "b t h w d"]:
    """Normalise x, then scale and shift it, in float32 (adaLN)."""
    return layer_norm(x) * (1 + scale) + shift


def standalone_mixer(spec: Spec, heads: int = 1) -> Any:
    """Build the mixer of a spec outside of a network.

    Raises:
        ConfigError: the spec names no row of MIXERS, or its fields do not fit together.
    """
    return build(spec, MIXERS, "model.pattern", heads=heads, dtype=jnp.float32, parent=None)


def has_cross_attention(mixer: Mixer, cross: str) -> bool:
    """Return whether a block with this mixer attends to the text."""
    return CROSS[cross].in_temporal_blocks or not mixer.temporal


class Block(nn.Module):
    """One mixer, cross-attention to the text, one MLP, each a residual.

    An image, a clip of one frame, skips blocks whose mixer works over time alone (Latte's
    enable_temporal_attentions = False). Images therefore train and test the other blocks.
    """

    mixer: Spec
    heads: int  # of attention
    hidden: int  # features inside the MLP
    activation: str  # a row of ACTIVATIONS
    cross: str  # a row of CROSS
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        modulation: Float[Array, "b #t 6 d"],
        ports: Ports,
        context: MixContext,
    ) -> Float[Array, "b t h w d"]:
        """Process the tokens of a clip."""
        x = checkpoint_name(x, RESIDUAL)
        name = self.mixer["name"]
        mixer = build(
            self.mixer, MIXERS, "model.pattern", heads=self.heads, dtype=self.dtype, name=name
        )
        is_image = x.shape[1] == 1 and context.past is None
        if mixer.temporal and is_image and not self.is_initializing():
            return x

        # The modulation of the network and the table of the block: b t 1 1 6 d.
        table = self.param("table", nn.initializers.zeros, (6, x.shape[-1]), jnp.float32)
        rows = (modulation + table[None, None])[:, :, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = (rows[..., i, :] for i in range(6))

        # Residuals are summed in float32, as the gates are, and rounded to the type of x.
        y = mixer(modulate(x, shift1, scale1).astype(self.dtype), context)
        x = (x + gate1 * y).astype(x.dtype)

        if ports.tokens is not None and has_cross_attention(mixer, self.cross):
            x = x + self.cross_attention(x, ports, context.attention)

        mlp = MLP(self.hidden, self.activation, self.dtype, name="mlp")
        y = mlp(modulate(x, shift2, scale2).astype(self.dtype))
        x = (x + gate2 * y).astype(x.dtype)
        return constrain(x, "b t h w d", context="t")

    def cross_attention(
        self, x: Float[Array, "b t h w d"], ports: Ports, backend: str
    ) -> Float[Array, "b t h w d"]:
        """Attend to the tokens and the image tokens of the ports."""
        normed = CROSS[self.cross].normed
        attention = CrossAttention(self.heads, self.dtype, normed, backend, name="cross")
        if normed:
            x = LayerNorm(name="cross_norm")(x)
        assert ports.tokens is not None
        return attention(x, ports.tokens, ports.tokens_mask, ports.image_tokens)


class Stream(NamedTuple):
    """The arrays that pass from layer to layer."""

    x: Array  # tokens [b t h w d]
    control: Array | None  # tokens of the control blocks [b t h w d]
    # Positions in time [t 1 1 d], to be added before the first block over time alone (Latte).
    frame_positions: Array | None


class Period(nn.Module):
    """One pass through the pattern; `nn.scan` repeats it over the depth.

    Control tokens (Jiang et al. 2025, VACE) pass through a block of their own. A projection of
    them, the hint, is added to the clip's tokens after the first block.
    """

    pattern: tuple[Spec, ...]
    # The fields of Block:
    heads: int  # of attention
    hidden: int
    activation: str
    cross: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        stream: Stream,
        modulation: Float[Array, "b t 6 d"],
        ports: Ports,
        context: MixContext,
    ) -> tuple[Stream, None]:
        """Process the stream; the second result is the empty output that nn.scan requires."""
        x, control, frame_positions = stream
        for i, spec in enumerate(self.pattern):
            if frame_positions is not None and standalone_mixer(spec).temporal:
                x = x + frame_positions[None]
                frame_positions = jnp.zeros_like(frame_positions)  # they are added once

            x = self.block(spec, f"block_{i}")(x, modulation, ports, context)
            if control is not None and i == 0:
                control = self.block(spec, "control")(control, modulation, ports, context)
                assert ports.control_scale is not None
                x = self.add_hint(x, control, ports.control_scale)
        return Stream(x, control, frame_positions), None

    def block(self, spec: Spec, name: str) -> Block:
        """Build a block of this network."""
        return Block(
            spec, self.heads, self.hidden, self.activation, self.cross, self.dtype, name=name
        )

    def add_hint(
        self,
        x: Float[Array, "b t h w d"],
        control: Float[Array, "b t h w d"],
        control_scale: Float[Array, "b"],
    ) -> Float[Array, "b t h w d"]:
        """Add the projection of control tokens, zero in a fresh network."""
        project = nn.Dense(
            x.shape[-1], name="hint", dtype=x.dtype, kernel_init=nn.initializers.zeros
        )
        hint = project(control)
        scale = control_scale[:, None, None, None, None]
        return (x + scale * hint).astype(x.dtype)
