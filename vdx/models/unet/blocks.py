"""Blocks of the U-Nets: attention in space, in time and to text, convolution in time, the encoder.

Clips stay [b t h w c] throughout; what works on images takes t for a part of the batch. The
references are the blocks of diffusers' `UNet2DConditionModel`, `UNetMotionModel` and
`UNet3DConditionModel`, whose weights are configurations of these (vdx.interop.unet).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from vdx.config.build import build, lookup
from vdx.models.attention.backends import attend
from vdx.models.image_blocks import GroupNorm, ImageResidual
from vdx.models.layers import MLP, EmbedMLP, LayerNorm, add_vector, rope_table, sinusoidal
from vdx.models.mixers.grid_attention import MIXERS, MixContext
from vdx.models.transformer import REMAT
from vdx.models.vae.blocks import down_conv, split_space
from vdx.parallel import constrain
from vdx.types import Array, Bool, DTypeLike, Float

# Which axes of the grid attend to one another; the rest is batch.
ATTENTION_AXES = {"space": "b t (h w) n d", "time": "b h w t n d", "tokens": "b (t h w) n d"}


@dataclasses.dataclass(frozen=True)
class Temporal:
    """What lies between the frames of a U-Net.

    motion: motion modules, after the image layers; with `everywhere`, also at levels without
    attention. positions: frames are told their place. attentions: how many of a motion module
    follow one another. convs: a convolution in time after every residual, and a motion module
    before the first level. mixer: a row of MIXERS with its fields in the attentions' place.
    """

    motion: bool = True
    everywhere: bool = True
    positions: bool = True
    attentions: int = 2
    convs: bool = False
    mixer: Mapping[str, Any] | None = None


TEMPORAL: dict[str, Temporal] = {
    "none": Temporal(motion=False),
    "motion": Temporal(),  # AnimateDiff
    "3d": Temporal(everywhere=False, positions=False, convs=True),  # ModelScope
}


def temporal_of(spec: str | Mapping[str, Any]) -> Temporal:
    """A row of TEMPORAL, or motion modules around the row of MIXERS that a spec names."""
    if isinstance(spec, str):
        return lookup(spec, TEMPORAL, "model.temporal")
    build(spec, MIXERS, "model.temporal", heads=1, dtype=jnp.float32, parent=None)
    return Temporal(positions=False, mixer=spec)


@dataclasses.dataclass(frozen=True)
class Common:
    """What all blocks of one U-Net share: see UNet."""

    heads: int
    head_width: int
    groups: int
    joint: bool
    temporal: Temporal
    dtype: Any

    def split(self, width: int, motion: bool = False) -> tuple[int, int]:
        """(heads, their width) in attention at this width."""
        if self.head_width and (self.temporal.convs or not motion):
            return width // self.head_width, self.head_width
        return self.heads, width // self.heads


class PlainAttention(nn.Module):
    """Queries from the grid [b t h w d]; keys and values from the same frame ("space"), the same
    place ("time"), or tokens [b l e]. Only the last projection has a bias."""

    over: str
    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        tokens: Float[Array, "b l e"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b t h w d"]:
        width, flat = x.shape[-1], ATTENTION_AXES[self.over]
        sizes = dict(zip("bthw", x.shape[:4], strict=True))

        def project(name: str, y: Array) -> Array:
            y = nn.Dense(width, use_bias=False, name=name, dtype=self.dtype)(y)
            if y.ndim == 3:
                return rearrange(y, "b l (n d) -> b l n d", n=self.heads)
            return rearrange(y, f"b t h w (n d) -> {flat}", n=self.heads)

        source = x if tokens is None else tokens
        y = attend(project("q", x), project("k", source), project("v", source), mask)
        y = rearrange(y, f"{flat} -> b t h w (n d)", **sizes)
        return nn.Dense(width, name="out", dtype=self.dtype)(y)


class TransformerLayer(nn.Module):
    """Attention over space or time, then to the text (space) or again over time, then a gated MLP;
    each a residual after a norm."""

    over: str
    heads: int
    temporal: Temporal
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w d"], tokens: Array | None, mask: Array | None
    ) -> Float[Array, "b t h w d"]:
        temporal, mixer = self.over == "time", self.temporal.mixer

        def attention(x: Array, i: int, over: str, *source) -> Array:
            y = LayerNorm(1e-5, name=f"norm{i}")(x)
            if temporal and self.temporal.positions:
                y = y + frame_positions(x.shape[1], x.shape[-1]).astype(y.dtype)
            return x + PlainAttention(over, self.heads, self.dtype, name=f"attn{i}")(y, *source)

        if temporal and mixer is not None:
            _, t, h, w, d = x.shape
            rope = rope_table((t, h, w), d // self.heads)
            layer = build(
                mixer,
                MIXERS,
                "model.temporal",
                heads=self.heads,
                dtype=self.dtype,
                name=mixer["name"],
            )
            x = x + layer(LayerNorm(1e-5, name="norm1")(x), MixContext(rope=rope))
        else:
            x = attention(x, 1, self.over)
            if temporal and self.temporal.attentions > 1:
                x = attention(x, 2, self.over)
            elif not temporal and tokens is not None:
                x = attention(x, 2, "tokens", tokens, mask)
        mlp = MLP(8 * x.shape[-1], "geglu", self.dtype, x.shape[-1], name="mlp")
        return x + mlp(LayerNorm(1e-5, name="norm3")(x))


def frame_positions(frames: int, width: int) -> Float[Array, "t 1 1 d"]:
    """Sines and cosines of the frames' numbers, in turn (Vaswani et al. 2017)."""
    cos, sin = jnp.split(sinusoidal(jnp.arange(frames), width), 2, -1)
    return jnp.stack([sin, cos], -1).reshape(frames, 1, 1, width)


class Exchange(nn.Module):
    """Norm, projection, a transformer layer over "space" or "time", and back: a residual, which at
    first changes nothing. heads, width: of the layer inside."""

    over: str
    heads: int
    width: int
    common: Common

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], tokens: Array | None = None, mask: Array | None = None
    ) -> Float[Array, "b t h w c"]:
        common, time = self.common, self.over == "time"
        # What is attended over must lie on one device.
        y = split_space(x) if time else x
        y = GroupNorm(common.groups, joint=time and common.joint, name="norm")(y)
        y = nn.Dense(self.width, name="proj_in", dtype=common.dtype)(y)
        y = TransformerLayer(self.over, self.heads, common.temporal, common.dtype, name="layer")(
            y, tokens, mask
        )
        y = nn.Dense(
            x.shape[-1], name="proj_out", dtype=common.dtype, kernel_init=nn.initializers.zeros
        )(y)
        return constrain(x + y, "b t h w c", context="t")


class TimeConvs(nn.Module):
    """Four convolutions over three frames, each after a group norm of the whole clip and SiLU: a
    residual, which at first changes nothing."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        y, (frames, width) = split_space(x), (x.shape[1], x.shape[-1])
        for i in range(4):
            y = nn.silu(GroupNorm(self.groups, 1e-5, joint=True, name=f"norm_{i}")(y))
            # One matrix product: three frames side by side.
            y = jnp.pad(y, [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])
            y = jnp.concatenate([y[:, k : k + frames] for k in range(3)], -1)
            init = nn.initializers.zeros if i == 3 else nn.initializers.lecun_normal()
            y = nn.Dense(width, name=f"conv_{i}", dtype=self.dtype, kernel_init=init)(y)
        return constrain(x + y, "b t h w c", context="t")


class Layer(nn.Module):
    """A residual, then what of convolution in time, attention and motion module there is."""

    features: int
    attention: bool
    motion: bool
    common: Common

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], emb: Array, tokens: Array | None, mask: Array | None
    ) -> Float[Array, "b t h w f"]:
        common, width = self.common, self.features
        x = checkpoint_name(x, "residual")
        x = ImageResidual(width, common.groups, common.dtype, 1e-5, name="res")(x, emb)
        x = constrain(x, "b t h w c", context="t")
        if common.temporal.convs:
            x = TimeConvs(common.groups, common.dtype, name="time_convs")(x)
        if self.attention:
            x = Exchange("space", common.split(width)[0], width, common, name="space")(
                x, tokens, mask
            )
        if self.motion:
            x = Exchange("time", common.split(width, motion=True)[0], width, common, name="motion")(
                x
            )
        return x


def layer_of(remat: str) -> type[Layer]:
    """Layer, or with `remat` a layer that keeps less of the forward pass."""
    policy = lookup(remat, REMAT, "model.remat")
    return Layer if policy is None else nn.remat(Layer, policy=policy)


class Encoder(nn.Module):
    """The way down and the middle: (embedding [b t|1 1 1 d], skips, deepest [b t h w c]).

    hint: added to what the first convolution makes of the clip.
    """

    widths: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    motion_middle: bool
    remat: str
    common: Common

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        time: Float[Array, "b"] | Float[Array, "b t"],
        vector: Array | None,
        tokens: Array | None,
        mask: Array | None,
        hint: Array | None = None,
    ) -> tuple[Array, list[Array], Array]:
        common, temporal, first = self.common, self.common.temporal, self.widths[0]
        layer = layer_of(self.remat)
        emb = EmbedMLP(4 * first, sinusoid=first, name="time")(time)
        if vector is not None:
            emb = add_vector(emb, vector, x.shape[1])
        emb = emb.reshape(len(x), -1, 1, 1, emb.shape[-1])

        x = nn.Conv(first, (3, 3), dtype=common.dtype, name="conv_in")(x)
        x = x if hint is None else x + hint
        x = constrain(x, "b t h w c", context="t")
        if temporal.convs:
            heads, width = common.heads, common.head_width or first // common.heads
            x = Exchange("time", heads, heads * width, common, name="motion_in")(x)
        skips = [x]
        for i, (width, attention) in enumerate(zip(self.widths, self.attention, strict=True)):
            motion = temporal.motion and (attention or temporal.everywhere)
            for j in range(self.layers):
                x = layer(width, attention, motion, common, name=f"down_{i}_{j}")(
                    x, emb, tokens, mask
                )
                skips.append(x)
            if i < len(self.widths) - 1:
                x = down_conv(width, common.dtype, f"down_{i}_conv", before=1)(x)
                skips.append(x)
        for j, attention in enumerate((True, False)):
            motion = temporal.motion and attention and self.motion_middle
            x = layer(self.widths[-1], attention, motion, common, name=f"middle_{j}")(
                x, emb, tokens, mask
            )
        return emb, skips, x
