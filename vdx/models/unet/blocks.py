"""Blocks of the U-Nets: attention in space, in time, to text; convolutions.

Clips stay [b t h w c] throughout; layers of images treat t as a part of the batch. The references
are the blocks of diffusers' `UNet2DConditionModel`, `UNetMotionModel` and `UNet3DConditionModel`,
whose weights are configurations of these (vdx.interop.unet).
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
from vdx.models.image_blocks import GroupNorm, ImageResidual, split_space
from vdx.models.layers import MLP, LayerNorm
from vdx.models.mixers.context import MixContext
from vdx.models.mixers.table import MIXERS
from vdx.models.positions import rope_table, sinusoidal
from vdx.models.remat import REMAT
from vdx.models.unet.temporal import Temporal
from vdx.parallel import constrain
from vdx.types import Array, Bool, DTypeLike, Float

# Which axes of the grid attend to one another; the rest is batch.
ATTENTION_AXES = {"space": "b t (h w) n d", "time": "b h w t n d", "tokens": "b (t h w) n d"}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Fields that all blocks of one U-Net share, from those of UNet."""

    heads: int
    head_width: int  # 0: the features divided by the heads
    groups: int  # of the group norms
    joint_norm: bool  # motion modules normalise all frames of a clip at once
    temporal: Temporal
    dtype: DTypeLike  # of the matrix products
    joint_residual_norm: bool = False  # residuals normalise all frames of a clip at once

    def heads_at(self, width: int, motion: bool = False) -> tuple[int, int]:
        """Return (heads, their width) of attention, or of a motion module, at this width."""
        if self.head_width and (self.temporal.convs or not motion):
            return width // self.head_width, self.head_width
        return self.heads, width // self.heads


class PlainAttention(nn.Module):
    """Attention with queries from the grid, without norms or rotary positions.

    Keys and values come from the same frame ("space"), from the same position in all frames
    ("time"), or from tokens. Only the last projection has a bias.
    """

    axes: str  # a row of ATTENTION_AXES
    heads: int
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        tokens: Float[Array, "b l e"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b t h w d"]:
        """Attend; `mask` is True on tokens, None if all are."""
        b, t, h, w, width = x.shape
        flat = ATTENTION_AXES[self.axes]

        # Project, and flatten what attends into one axis.
        q = rearrange(self._project("q", x, width), f"b t h w (n d) -> {flat}", n=self.heads)
        if tokens is None:
            source = x
            split = f"b t h w (n d) -> {flat}"
        else:
            source = tokens
            split = "b l (n d) -> b l n d"
        k = rearrange(self._project("k", source, width), split, n=self.heads)
        v = rearrange(self._project("v", source, width), split, n=self.heads)

        # [... s n d], then back to the grid.
        y = attend(q, k, v, mask)
        y = rearrange(y, f"{flat} -> b t h w (n d)", b=b, t=t, h=h, w=w)
        return nn.Dense(width, name="out", dtype=self.dtype)(y)

    def _project(self, name: str, x: Float[Array, "... e"], width: int) -> Float[Array, "... d"]:
        return nn.Dense(width, use_bias=False, name=name, dtype=self.dtype)(x)


class SpaceLayer(nn.Module):
    """Attention within each frame, attention to the text, then a gated MLP.

    Without a text there is no attention to it. Each is a residual after a norm.
    """

    heads: int
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        tokens: Float[Array, "b l e"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b t h w d"]:
        """Apply the layer; `mask` is True on tokens."""
        attention = PlainAttention("space", self.heads, self.dtype, name="attn1")
        x = x + attention(_norm("norm1")(x))
        if tokens is not None:
            attention = PlainAttention("tokens", self.heads, self.dtype, name="attn2")
            x = x + attention(_norm("norm2")(x), tokens, mask)
        return x + _mlp(x, self.dtype)


class TimeLayer(nn.Module):
    """Attention, or a mixer, over the frames at each position, then a gated MLP.

    Each is a residual after a norm.
    """

    heads: int
    temporal: Temporal
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"]) -> Float[Array, "b t h w d"]:
        """Apply the layer."""
        if self.temporal.mixer is not None:
            x = x + self._mix(_norm("norm1")(x), self.temporal.mixer)
        else:
            x = x + self._attend(x, 1)
            if self.temporal.attentions > 1:
                x = x + self._attend(x, 2)
        return x + _mlp(x, self.dtype)

    def _attend(self, x: Float[Array, "b t h w d"], i: int) -> Float[Array, "b t h w d"]:
        y = _norm(f"norm{i}")(x)
        if self.temporal.positions:
            positions = frame_positions(x.shape[1], x.shape[-1]).astype(y.dtype)
            y = y + positions[None]
        return PlainAttention("time", self.heads, self.dtype, name=f"attn{i}")(y)

    def _mix(
        self, x: Float[Array, "b t h w d"], spec: Mapping[str, Any]
    ) -> Float[Array, "b t h w d"]:
        _, t, h, w, width = x.shape
        rope = rope_table((t, h, w), width // self.heads)
        mixer = build(
            spec,
            MIXERS,
            "model.temporal",
            heads=self.heads,
            dtype=self.dtype,
            name=spec["name"],
        )
        return mixer(x, MixContext(rope=rope))


def _norm(name: str) -> LayerNorm:
    """Return a norm in the calling module's scope."""
    return LayerNorm(1e-5, name=name)


def _mlp(x: Float[Array, "b t h w d"], dtype: DTypeLike) -> Float[Array, "b t h w d"]:
    """Apply norm and gated MLP in the calling module's scope."""
    width = x.shape[-1]
    # 8: hidden features are 4 times the width, and as many gate them.
    mlp = MLP(8 * width, "geglu", dtype, width, name="mlp")
    return mlp(_norm("norm3")(x))


def frame_positions(frames: int, width: int) -> Float[Array, "t 1 1 d"]:
    """Embed frame numbers as sines and cosines, interleaved (Vaswani et al. 2017)."""
    cos, sin = jnp.split(sinusoidal(jnp.arange(frames), width), 2, -1)
    return jnp.stack([sin, cos], -1).reshape(frames, 1, 1, width)


class SpaceTransformer(nn.Module):
    """Norm, projection, a SpaceLayer, and back.

    A residual, which at first changes nothing.
    """

    heads: int
    width: int  # features of the layer inside
    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        tokens: Float[Array, "b l e"] | None = None,
        mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Apply the block; `mask` is True on tokens."""
        y = GroupNorm(self.config.groups, name="norm")(x)
        y = nn.Dense(self.width, name="proj_in", dtype=self.config.dtype)(y)
        y = SpaceLayer(self.heads, self.config.dtype, name="layer")(y, tokens, mask)
        y = zero_dense(x.shape[-1], "proj_out", self.config.dtype)(y)
        return constrain(x + y, "b t h w c", context="t")


class TimeTransformer(nn.Module):
    """A motion module: norm, projection, a TimeLayer, and back.

    A residual, which at first changes nothing.
    """

    heads: int
    width: int  # features of the layer inside
    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """Apply the block."""
        config = self.config
        y = split_space(x)  # attention needs all frames on one device
        y = GroupNorm(config.groups, joint=config.joint_norm, name="norm")(y)
        y = nn.Dense(self.width, name="proj_in", dtype=config.dtype)(y)
        y = TimeLayer(self.heads, config.temporal, config.dtype, name="layer")(y)
        y = zero_dense(x.shape[-1], "proj_out", config.dtype)(y)
        return constrain(x + y, "b t h w c", context="t")


def zero_dense(features: int, name: str, dtype: DTypeLike) -> nn.Dense:
    """Return a dense layer whose kernel is zero at first."""
    return nn.Dense(features, name=name, dtype=dtype, kernel_init=nn.initializers.zeros)


class TimeConvs(nn.Module):
    """Four convolutions over three frames: a residual, which at first changes nothing.

    Each comes after SiLU and a group norm of the whole clip.
    """

    groups: int  # of the group norms
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        """Apply the block."""
        frames = x.shape[1]
        width = x.shape[-1]
        y = split_space(x)
        for i in range(4):
            y = nn.silu(GroupNorm(self.groups, 1e-5, joint=True, name=f"norm_{i}")(y))
            # One matrix product over the features of three frames. [b t h w 3c]
            y = jnp.pad(y, [(0, 0), (1, 1), (0, 0), (0, 0), (0, 0)])
            y = jnp.concatenate([y[:, k : k + frames] for k in range(3)], -1)
            init = nn.initializers.zeros if i == 3 else nn.initializers.lecun_normal()
            y = nn.Dense(width, name=f"conv_{i}", dtype=self.dtype, kernel_init=init)(y)
        return constrain(x + y, "b t h w c", context="t")


class Layer(nn.Module):
    """A residual, then the layers that connect positions and frames.

    These are convolutions in time, attention and a motion module, where there are any.
    """

    features: int  # channels of the output
    attention: bool  # attention within frames and to the text
    motion: bool  # a motion module
    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        emb: Float[Array, "b _ 1 1 e"],
        tokens: Float[Array, "b l k"] | None,
        mask: Bool[Array, "b l"] | None,
    ) -> Float[Array, "b t h w f"]:
        """Apply the layer. `emb` embeds the time of the clip, or of each frame."""
        config = self.config
        width = self.features

        # `remat` may keep the features between layers by this name.
        x = checkpoint_name(x, "residual")
        joint = config.joint_residual_norm
        x = ImageResidual(width, config.groups, config.dtype, 1e-5, joint, name="res")(x, emb)
        x = constrain(x, "b t h w c", context="t")

        # Space and time, where this level has them.
        if config.temporal.convs:
            x = TimeConvs(config.groups, config.dtype, name="time_convs")(x)
        if self.attention:
            heads, _ = config.heads_at(width)
            x = SpaceTransformer(heads, width, config, name="space")(x, tokens, mask)
        if self.motion:
            heads, _ = config.heads_at(width, motion=True)
            x = TimeTransformer(heads, width, config, name="motion")(x)
        return x


def layer_class(remat: str) -> type[Layer]:
    """Return Layer, or a Layer that keeps less of the forward pass.

    remat: a row of REMAT.
    """
    policy = lookup(remat, REMAT, "model.remat")
    return Layer if policy is None else nn.remat(Layer, policy=policy)
