"""The spatiotemporal transformer: patches -> blocks of (mixer, cross-attention, MLP) -> patches.

Modulation is adaLN-single (Chen et al. 2023, PixArt-alpha; also Wan): one projection of the
time embedding for the whole network plus a learned table in each block. The design is that of
Wan 2.1 and 2.2, so that their weights are a configuration of this class (vdx/interop/wan.py).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from vdx.config.build import ConfigError, build, lookup
from vdx.models.attention.backends import BACKENDS, CONTEXTS
from vdx.models.attention.blockwise import SAVED
from vdx.models.attention.layers import CrossAttention
from vdx.models.layers import (
    MLP,
    EmbedMLP,
    LayerNorm,
    add_vector,
    layer_norm,
    low_frequencies,
    place_table,
    plane_table,
    rope_table,
    shift_rope,
    sincos_table,
)
from vdx.models.mixers.grid_attention import MIXERS, PATTERNS, CachePosition, MixContext
from vdx.parallel import constrain
from vdx.types import Array, DTypeLike, Float, Ports

# width, depth, heads, hidden features of the MLP for each feature of the width
SIZES: dict[str, tuple[int, int, int, float]] = {
    "tiny": (192, 6, 6, 4),
    "S": (384, 12, 6, 4),
    "B": (768, 12, 12, 4),
    "L": (1024, 24, 16, 4),
    "XL": (1152, 28, 9, 4),  # heads of 128: a TPU pads those of 72 to 128
    "wan_1p3b": (1536, 30, 12, 8960 / 1536),  # Wan 2.1
    "wan_5b": (3072, 30, 24, 14336 / 3072),  # Wan 2.2 TI2V
    "wan_14b": (5120, 40, 40, 13824 / 5120),  # Wan 2.1, and each expert of Wan 2.2 A14B
}

_policies = jax.checkpoint_policies
# What is kept from the forward pass for the backward pass; beside it the input of every layer.
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "save_attention": _policies.save_only_these_names(SAVED),
    # As "full", but those inputs wait in the host's memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
# Whether cross-attention is normalised, its input and its queries and keys, and is in every block.
CROSS = {
    "normed": True,  # Wan
    "plain": False,  # PixArt-alpha and Latte: in no block over time alone
}


def check_remat(name: str, device: Any) -> None:
    """Raises ConfigError for a policy that needs memory of the host which the device lacks."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if name == "offload" and "pinned_host" not in kinds:
        raise ConfigError(
            f"config.model.backbone.remat = 'offload' needs memory of the kind "
            f"pinned_host, and {device.device_kind} has {', '.join(kinds)}. Take "
            "'full', which keeps the same on the device."
        )


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
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w d"],
        modulation: Float[Array, "b #t 6 d"],
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
    block: Mapping[str, Any]

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


class Transformer(nn.Module):
    """denoiser(x_t [b t h w c], time [b], ports) -> prediction [b t h w c].

    `time` may also be [b t], one for each frame (Wan 2.2 TI2V gives 0 to a known first frame,
    diffusion forcing each frame its own); a patch takes that of its first frame. past: x is one
    block of a clip, and the collection "cache" holds what its mixers see of those before.

    size: a row of SIZES; width, depth, heads and mlp_ratio override it.
    patch: frames, rows and columns of one token; the grid must divide by it.
    pattern: a row of PATTERNS or a tuple of rows of MIXERS, each a name or {"name": row,
    **fields}, repeated over the depth; with the port `control` there is one control block to each
    repetition.
    rope_theta: sets the slowest rotation of the rotary positions; a grid of a few tokens wants
    a small one. absolute: tokens are also told their place in the clip, so that attention can
    average places (where is the object?), which rotary positions alone learn much later. sincos:
    fixed positions are added, those of a frame, which is as many places long, to its patches, and
    those in time before the first block over time alone (Latte); 0: none. cross: a row of CROSS.
    skip: what lies beside the clip at the port `concat` also reaches the prediction directly, by a
    linear map of each patch, zero at first: a given frame need not pass through a narrow width.
    time_scale: multiplies the time that is embedded; below 1 neighbouring noise levels share
    what they learn, which a short training needs. remat: a row of REMAT. attention: "auto" or a row
    of BACKENDS; context: a row of CONTEXTS, for "full" attention without blocks on a mesh that
    splits tokens (see attend). dtype: compute type of the matrix products.
    """

    channels: int = 3
    size: str = "tiny"
    patch: tuple[int, int, int] = (1, 2, 2)
    pattern: str | tuple[Any, ...] = "full"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    activation: str = "gelu"
    rope_theta: float = 10_000.0
    absolute: bool = False
    sincos: int = 0
    cross: str = "normed"
    skip: bool = False
    time_scale: float = 1.0
    remat: str = "none"
    attention: str = "auto"
    context: str = "gather"
    dtype: str = "float32"

    def dims(self) -> tuple[int, int, int, tuple[Mapping[str, Any], ...]]:
        """(width, depth, heads, pattern), checked; the pattern as specs of MIXERS."""
        width, depth, heads, _ = lookup(self.size, SIZES, "model.size")
        width, depth, heads = self.width or width, self.depth or depth, self.heads or heads
        pattern = self.pattern
        if isinstance(pattern, str):
            pattern = lookup(pattern, PATTERNS, "model.pattern")
        pattern = tuple({"name": one} if isinstance(one, str) else dict(one) for one in pattern)
        for spec in pattern:
            mixer_of(spec, heads)
        lookup(self.cross, CROSS, "model.cross")
        lookup(self.attention, {"auto": None, **BACKENDS}, "model.attention")
        lookup(self.context, CONTEXTS, "model.context")
        if depth % len(pattern):
            raise ConfigError(f"model.depth = {depth} is not a multiple of the pattern {pattern}.")
        if width % (2 * heads):
            raise ConfigError(f"model.width = {width} over {heads} heads is not an even number.")
        return width, depth, heads, pattern

    def over_time(self) -> list[Any]:
        """The mixers of the pattern that look beyond a frame."""
        mixers = [mixer_of(spec) for spec in self.dims()[3]]
        return [mixer for mixer in mixers if getattr(mixer, "over", "") not in ("space", "none")]

    def block(self) -> int | None:
        """Frames of tokens in a block, if what a token sees ends with its block, so that a clip
        can be made block by block; else None. (Biases of distances are not kept in caches.)"""
        sizes = {
            getattr(mixer, "block", None) if getattr(mixer, "positions", "") != "relative" else None
            for mixer in self.over_time()
        }
        return sizes.pop() if len(sizes) == 1 else None

    def hidden(self) -> int:
        """Hidden features of the MLPs."""
        ratio = self.mlp_ratio or lookup(self.size, SIZES, "model.size")[3]
        return round(self.dims()[0] * ratio)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The token grid of a clip [t h w c]; raises ValueError if patches do not tile it."""
        if any(n % p for n, p in zip(shape[:3], self.patch, strict=True)):
            raise ValueError(
                f"A clip of {shape[:3]} (t, h, w) does not divide into patches of "
                f"{self.patch}; choose sizes that are multiples of the patch."
            )
        t, h, w = (n // p for n, p in zip(shape[:3], self.patch, strict=True))
        return t, h, w

    def flops(self, shape: tuple[int, ...], ports: Ports) -> float:
        """Operations of the matrix products of one forward pass of one clip [t h w c], two to a
        multiply-add. ports: of a batch of any size; their shapes are enough."""
        width, depth, heads, pattern = self.dims()
        grid, patch = self.grid(shape), math.prod(self.patch)
        tokens, hidden = math.prod(grid), self.hidden()
        down = hidden / 2 if self.activation == "geglu" else hidden

        def cross(mixer: Any) -> float:
            normed = CROSS[self.cross]
            if ports.tokens is None or (mixer.temporal and not normed):
                return 0.0
            read = [x.shape[1:] for x in (ports.tokens, ports.image_tokens) if x is not None]
            return (
                4.0
                * width
                * (tokens * width + sum(length * (features + tokens) for length, features in read))
            )

        def block(mixer: Any) -> float:
            if mixer.temporal and grid[0] == 1:
                return 0.0
            mlp = 2.0 * tokens * width * (hidden + down)
            return mixer.flops(grid, width) + cross(mixer) + mlp

        blocks = [block(mixer_of(spec, heads)) for spec in pattern]
        beside = 0 if ports.concat is None else ports.concat.shape[-1]
        ends = 1.0 * width * (2 * self.channels + beside)
        ends += self.skip * patch * beside * self.channels
        if ports.control is not None:
            blocks.append(blocks[0] + 2.0 * tokens * width**2)
            ends += width * (ports.control.shape[-1] + width / patch)
        time = width * (256 + 7.0 * width)
        return depth // len(pattern) * sum(blocks) + 2.0 * (tokens * patch * ends + time)

    def frame_times(self, x: Float[Array, "b t h w c"], time: Array) -> Array:
        """[b], one time for all tokens, or [b t], one for each frame of tokens."""
        if time.ndim == 1:
            return time
        if time.shape != x.shape[:2]:
            raise ValueError(
                f"time is {time.shape}; a clip of {x.shape[:2]} (b, t) needs one time "
                "for each clip [b] or for each frame [b t]."
            )
        return time[:, :: self.patch[0]]

    def patches(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b T H W k"]:
        pt, ph, pw = self.patch
        return rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=pt, j=ph, k=pw)

    def tokens(self, x: Float[Array, "b t h w c"], name: str) -> Float[Array, "b T H W d"]:
        """Patches start as their lowest frequencies, and are drawn from them again at the end."""
        return nn.Dense(
            self.dims()[0],
            name=name,
            dtype=jnp.dtype(self.dtype),
            kernel_init=low_frequencies(self.patch),
        )(self.patches(x))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        time: Float[Array, "b"],
        ports: Ports,
        past: CachePosition | None = None,
    ) -> Float[Array, "b t h w c"]:
        width, depth, heads, pattern = self.dims()
        dtype, (pt, ph, pw) = jnp.dtype(self.dtype), self.patch
        grid, time = self.grid(x.shape[1:]), self.frame_times(x, time)
        out = partial(nn.Dense, pt * ph * pw * self.channels, dtype=jnp.float32)
        direct: Array | float = 0.0
        if ports.concat is not None:
            x = jnp.concatenate([x, ports.concat.astype(x.dtype)], -1)
            if self.skip:
                direct = out(name="skip", use_bias=False, kernel_init=nn.initializers.zeros)(
                    self.patches(ports.concat)
                )

        x = self.tokens(x, "patch")
        if self.absolute:
            # With blocks it is the place in the block: how long the clip will be is not known.
            places = place_table((self.block() or grid[0], *grid[1:]), width)
            x = x + jnp.asarray(places[np.arange(grid[0]) % len(places)], x.dtype)
        frames = None
        if self.sincos:
            x = x + jnp.asarray(plane_table(grid[1:], width, self.sincos), x.dtype)
            if grid[0] > 1:
                frames = jnp.asarray(sincos_table(np.arange(grid[0]), width), x.dtype)
                frames = frames[:, None, None]
        if ports.add is not None:
            x = x + ports.add.astype(x.dtype)
        x = constrain(x, "b t h w d", context="t")

        emb = EmbedMLP(width, name="time")(time * self.time_scale)  # b d or b t d
        if ports.vector is not None:
            emb = add_vector(emb, ports.vector, grid[0])
        modulation = nn.Dense(
            6 * width, name="modulation", dtype=jnp.float32, kernel_init=nn.initializers.zeros
        )(nn.silu(emb))
        modulation = modulation.reshape(len(x), -1, 6, width)  # b t 6 d
        if ports.modulation is not None:
            modulation = modulation + ports.modulation[:, None]
        control = None
        if ports.control is not None:
            control = nn.Dense(
                width, name="control_in", dtype=dtype, kernel_init=nn.initializers.zeros
            )(self.tokens(ports.control, "control_patch"))
            control = constrain(x + control, "b t h w d", context="t")
        if ports.tokens is not None:
            ports = ports.replace(tokens=ports.tokens.astype(dtype))
        if ports.image_tokens is not None:
            ports = ports.replace(image_tokens=ports.image_tokens.astype(dtype))

        rope = rope_table(grid, width // heads, self.rope_theta)
        context = MixContext(
            rope if past is None else shift_rope(rope, past.start, width // heads, self.rope_theta),
            past,
            self.attention,
            self.context,
        )
        policy = lookup(self.remat, REMAT, "model.remat")
        period = Period if policy is None else nn.remat(Period, policy=policy, prevent_cse=False)
        layers = nn.scan(
            period,
            variable_axes={"params": 0, "lora": 0, "cache": 0, "cross_kv": 0},
            split_rngs={"params": True, "lora": True},
            in_axes=nn.broadcast,
            length=depth // len(pattern),
        )
        fields = dict(
            heads=heads,
            hidden=self.hidden(),
            activation=self.activation,
            cross=self.cross,
            dtype=dtype,
        )
        (x, *_), _ = layers(pattern, fields, name="layers")(
            (x, control, frames), modulation, ports, context
        )

        table = self.param("table", nn.initializers.zeros, (2, width), jnp.float32)
        shift, scale = ((emb + row).reshape(len(x), -1, 1, 1, width) for row in table)
        x = modulate(x, shift, scale).astype(dtype)
        x = direct + out(name="unpatch", kernel_init=low_frequencies(self.patch, out=True))(x)
        return rearrange(x, "b t h w (i j k c) -> b (t i) (h j) (w k) c", i=pt, j=ph, k=pw)
