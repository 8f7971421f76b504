"""Mixers: how the tokens of a clip exchange information. One table, one signature.

A mixer is a linen module `(heads, dtype, **fields)` that maps the token grid [b t h w d] and a
`MixContext` to a grid of the same shape. The transformer's `pattern` names rows of MIXERS. Each
says of itself:
  temporal  whether it works over time alone: an image, a clip of one frame, passes by its block
  flops     (grid (t, h, w), width) -> floating-point operations of its matrix products and
            convolutions in one forward pass of one clip, two to a multiply-add
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vdx.build import ConfigError
from vdx.models.attention import attend
from vdx.models.conv import ConvMixer
from vdx.models.layers import RMSNorm, apply_rope
from vdx.models.recurrent import Recurrent
from vdx.parallel import back, constrain
from vdx.types import Array, Bool, Float


class MixContext(flax.struct.PyTreeNode):
    """What a mixer may need besides the tokens: rotary tables [t h w 1 d/2] (cos, sin)."""

    rope: tuple[Any, Any]


# einops patterns: which axes of the token grid attend to one another; the rest is batch. Then the
# number of tokens that each one sees.
OVER: dict[str, tuple[str, str, str, Callable[[int, int, int], int]]] = {
    "full": ("b t h w n d", "b (t h w) n d", "t", lambda t, h, w: t * h * w),
    "space": ("b t h w n d", "(b t) (h w) n d", "t", lambda t, h, w: h * w),
    "time": ("b t h w n d", "(b h w) t n d", "h", lambda t, h, w: t),
}
REACH = 32      # distances in time beyond this many frames have one bias


class GridAttention(nn.Module):
    """Self-attention over the token grid [b t h w d]: all tokens of the clip attend to one
    another.

    positions: "rope", 3D rotary positions, or "none". qk_norm: queries and keys are
    RMS-normalised across all heads (as Wan does).
    """

    heads: int
    dtype: jnp.dtype = jnp.float32
    positions: str = "rope"
    qk_norm: bool = True
    over = "full"        # a row of OVER
    temporal = False
    known_positions: ClassVar[tuple[str, ...]] = ("rope", "none")

    def __post_init__(self):
        if self.positions not in self.known_positions:
            raise ConfigError(f"model.pattern: positions = {self.positions!r} of the mixer over "
                              f"{self.over!r}; known: {', '.join(self.known_positions)}.")
        super().__post_init__()

    @nn.nowrap
    def flops(self, grid: tuple[int, int, int], width: int) -> float:
        return math.prod(grid) * width * (8.0 * width + 4.0 * OVER[self.over][3](*grid))

    @nn.nowrap
    def mask(self, frames: int) -> Bool[Array, "1 q s"] | None:
        """True on what each query may see; None: all."""
        return None

    def bias(self, frames: int) -> Float[Array, "1 n q s"] | None:
        """Added to the scores."""
        return None

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"],
                 context: MixContext) -> Float[Array, "b t h w d"]:
        width, (grid, flat, split, _) = x.shape[-1], OVER[self.over]
        # What is attended over must lie on one device, so the context axis splits another one
        # (for "full" XLA gathers keys and values).
        x = constrain(x, "b t h w d", context=split)
        q, k, v = (nn.Dense(width, name=name, dtype=self.dtype)(x) for name in "qkv")
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        q, k, v = (rearrange(a, "b t h w (n d) -> b t h w n d", n=self.heads) for a in (q, k, v))
        if self.positions == "rope":
            q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        q, k, v = (constrain(a, "b t h w n d", context=split) for a in (q, k, v))
        sizes = dict(zip("bthw", x.shape[:4], strict=True))
        q, k, v = (rearrange(a, f"{grid} -> {flat}") for a in (q, k, v))
        y = attend(q, k, v, self.mask(x.shape[1]), bias=self.bias(x.shape[1]))
        y = rearrange(y, f"{flat} -> {grid}", **sizes)
        y = rearrange(y, "b t h w n d -> b t h w (n d)")
        y = nn.Dense(width, name="out", dtype=self.dtype)(y)
        return back(y, split)


class SpaceAttention(GridAttention):
    """The tokens of one frame attend to one another."""

    over = "space"


class TimeAttention(GridAttention):
    """The tokens of one place attend to one another.

    causal: to those of their frame and before it alone. window: to those at most so many frames
    away; None: to all. positions: also "relative", a learned bias for each head and each distance
    in frames (Shaw et al. 2018; as scores, Raffel et al. 2020), the same beyond REACH. The number
    of frames may differ between training and use.
    """

    causal: bool = False
    window: int | None = None
    over = "time"
    temporal = True
    known_positions = ("rope", "relative", "none")

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ConfigError(f"model.pattern: window = {self.window} of 'time' must be at least "
                              "one frame; for frames that see nothing else name 'none'.")
        super().__post_init__()

    @nn.nowrap
    def mask(self, frames: int) -> Bool[Array, "1 q s"] | None:
        if not self.causal and self.window is None:
            return None
        ahead = _ahead(frames)
        far = frames if self.window is None else self.window
        return jnp.asarray((ahead >= -far) & (ahead <= (0 if self.causal else far)))[None]

    def bias(self, frames: int) -> Float[Array, "1 n q s"] | None:
        if self.positions != "relative":
            return None
        table = self.param("distance_table", nn.initializers.normal(0.02),
                           (2 * REACH + 1, self.heads), jnp.float32)
        rows = table[np.clip(_ahead(frames), -REACH, REACH) + REACH]
        return rearrange(rows, "q s n -> 1 n q s")


def _ahead(frames: int) -> np.ndarray:
    """[q s]: by how many frames the key is ahead of the query."""
    return np.arange(frames) - np.arange(frames)[:, None]


class NoExchange(nn.Module):
    """Every token is on its own: attention in which a token sees itself alone, which is its value.
    The control that a mixer is compared with."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    temporal = False     # so that the frames of a clip are as many images

    @nn.nowrap
    def flops(self, grid: tuple[int, int, int], width: int) -> float:
        return math.prod(grid) * 4.0 * width ** 2

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"],
                 context: MixContext) -> Float[Array, "b t h w d"]:
        v = nn.Dense(x.shape[-1], name="v", dtype=self.dtype)(x)
        return nn.Dense(x.shape[-1], name="out", dtype=self.dtype)(v)


MIXERS: dict[str, Callable[..., Any]] = {
    "full": GridAttention,
    "space": SpaceAttention,
    "time": TimeAttention,
    "conv": ConvMixer,
    "recurrent": Recurrent,
    "none": NoExchange,
}

# Names for block patterns; a config may also spell a pattern out, with names or specs
# {"name": row of MIXERS, **fields}, e.g. ("space", "full", {"name": "time", "causal": True}).
PATTERNS: dict[str, tuple[str | dict[str, Any], ...]] = {
    "full": ("full",),
    "factorized": ("space", "time"),   # Latte, VDM: space within a frame, then time at a place
    "factorized_causal": ("space", {"name": "time", "causal": True}),
    "conv": ("space", {"name": "conv", "kernel": (3, 1, 1)}),
    "recurrent": ("space", "recurrent"),
    "frames": ("space", "none"),       # independent frames
}
