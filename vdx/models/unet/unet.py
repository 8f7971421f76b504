"""U-Nets of images, with motion modules, and 3D.

These are Stable Diffusion 1.5, AnimateDiff and ModelScope. References: Rombach et al. 2022; Guo et
al. 2023, AnimateDiff; Wang et al. 2023, ModelScope. Their weights, in diffusers' layout, are
configurations of this class (vdx.interop.unet).
"""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdx.config.build import ConfigError, lookup
from vdx.config.ranges import ComputeType, Count, Index, OneOf
from vdx.flops import traced
from vdx.models.image_blocks import GroupNorm, upsample_nearest
from vdx.models.remat import REMAT
from vdx.models.unet.blocks import BlockConfig, layer_class
from vdx.models.unet.controlnet import CONTROLS, ControlNet
from vdx.models.unet.encoder import Conditions, Encoded, Encoder
from vdx.models.unet.temporal import temporal_of
from vdx.parallel import constrain
from vdx.types import Array, Float, Ports


class UNetDims(NamedTuple):
    """Sizes and layers that follow from a UNet's fields, checked."""

    width: int  # features that conditions are projected to
    blocks: BlockConfig


class UNet(nn.Module):
    """A backbone: (x_t, time, ports) -> prediction, in levels of half the size each.

    Without a temporal part the frames of a clip are independent images. A fresh motion module
    changes nothing.
    """

    channels: Count = 4  # of the prediction
    widths: tuple[Count, ...] = (320, 640, 1280, 1280)  # features of each level, finest first
    layers: Count = 2  # residuals in a level on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, True, True, False)  # levels with attention, also to text
    heads: Count = 8  # of every attention
    # If given, attention at width w has w / head_width heads instead; motion modules too if
    # `temporal` is "3d".
    head_width: Index = 0
    groups: Count = 32  # of the group norms
    # A row of TEMPORAL, or motion modules around a mixer: {"name": row of MIXERS, **fields}.
    temporal: str | Mapping[str, Any] = "none"
    # Motion modules normalise all frames of a clip at once, as diffusers does. False: each frame
    # by itself, as AnimateDiff's own code does.
    joint_norm: bool = True
    # Residuals and the norm before the last convolution do so, as AnimateDiff's own code does with
    # motion modules v1. False: each frame by itself, as everywhere else.
    joint_residual_norm: bool = False
    motion_middle: bool = True  # the middle has a motion module
    stem: tuple[Count, Count, Count] = (1, 1, 1)  # frames, rows, columns in one position of level 0
    control: Annotated[str, OneOf(lambda: ("none", *CONTROLS))] = (
        "none"  # a row of CONTROLS, a branch that reads the port `control`
    )
    # Widths of the convolutions of its maps, which are 2^(len(hint) - 1) times as high and wide
    # as the clip.
    hint: tuple[Count, ...] = (16, 32, 96, 256)
    remat: Annotated[str, OneOf(lambda: REMAT)] = "none"  # a row of REMAT
    dtype: ComputeType = "float32"  # of the matrix products

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns in one position of the deepest level."""
        t, h, w = self.stem
        times = 2 ** (len(self.widths) - 1)
        return t, h * times, w * times

    def dims(self) -> UNetDims:
        """Return sizes and layers.

        Raises ConfigError for fields that contradict one another.
        """
        # Names of other tables: an unknown one raises.
        temporal = temporal_of(self.temporal)
        lookup(self.remat, REMAT, "model.remat")
        lookup(self.control, {"none": None, **CONTROLS}, "model.control")

        # One entry of `attention` for each level.
        if len(self.attention) != len(self.widths) or not self.widths:
            raise ConfigError(
                f"model.attention = {self.attention} needs one entry for each of the levels "
                f"model.widths = {self.widths}."
            )

        # Features divide into groups and heads at every level.
        divisors = {
            "groups": self.groups,
            "heads": self.heads,
            "head_width": self.head_width or 1,
        }
        for width in self.widths:
            for name, divisor in divisors.items():
                if width % divisor:
                    raise ConfigError(
                        f"model.widths = {self.widths} are not multiples of "
                        f"model.{name} = {divisor}."
                    )

        blocks = BlockConfig(
            self.heads,
            self.head_width,
            self.groups,
            self.joint_norm,
            temporal,
            jnp.dtype(self.dtype),
            self.joint_residual_norm,
        )
        return UNetDims(4 * self.widths[0], blocks)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the positions (t, h, w) of the first level, of a clip [t h w c].

        Raises ValueError for a clip that the levels do not divide.
        """
        t, h, w = shape[:3]
        if any(size % unit for size, unit in zip((t, h, w), self.patch, strict=True)):
            raise ValueError(
                f"A clip of {(t, h, w)} (t, h, w) does not divide into the levels of "
                f"this U-Net: choose sizes that are multiples of {self.patch}."
            )
        return t // self.stem[0], h // self.stem[1], w // self.stem[2]

    @nn.nowrap
    def flops(self, shape: tuple[int, ...], ports: Ports) -> float:
        """Count the operations of one forward pass of one clip [t h w c].

        A multiply-add is two operations. Matrix products and convolutions are counted in the traced
        network. ports: of a batch of one; shapes are enough.
        """
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        params = jax.eval_shape(self.init, jax.random.key(0), x, time, ports)
        return traced(self.apply, params, x, time, ports)

    def check(self, x: Array, time: Array, ports: Ports) -> None:
        """Raise for inputs that do not fit this network.

        ValueError for sizes, ConfigError for a port that it lacks, or needs and does not get.
        """
        self.grid(x.shape[1:])

        # A time for each clip or for each frame.
        if time.shape not in (x.shape[:1], x.shape[:2]):
            raise ValueError(
                f"time is {time.shape}; a clip of {x.shape[:2]} (b, t) needs one time "
                "for each clip [b] or for each frame [b t]."
            )

        # No port is ignored in silence.
        unused = ["image_tokens", "add"]
        if self.control == "none":
            unused.append("control")
        for port in unused:
            if getattr(ports, port) is not None:
                raise ConfigError(
                    f"This U-Net has no port {port!r}: take the signal that gives it "
                    "out of config.model.signals."
                )

        if self.control != "none":
            self._check_control(x, ports)

    def _check_control(self, x: Array, ports: Ports) -> None:
        if ports.control is None:
            raise ConfigError(
                f"model.control = {self.control!r} needs the signal config.model.signals.control."
            )
        t, h, w = self.grid(x.shape[1:])
        side = 2 ** max(0, len(self.hint) - 1)
        if ports.control.shape[1:4] != (t, h * side, w * side):
            raise ValueError(
                f"Maps of control are {ports.control.shape[1:4]} (t, h, w); a clip of "
                f"{x.shape[1:4]} needs {(t, h * side, w * side)}: see "
                f"config.model.signals.control.side = {side}."
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        time: Float[Array, "b *frames"],  # [b] or [b t]
        ports: Ports,
    ) -> Float[Array, "b t h w c"]:
        """Predict from a noisy clip at the time of each clip, or of each frame."""
        config = self.dims().blocks
        self.check(x, time, ports)
        conditions = self._conditions(time, ports, config)

        encoded = self._encode(x, ports, conditions, config)
        if ports.control is not None:
            scale = ports.control_scale
            if scale is None:
                scale = jnp.ones(len(x))  # the branch acts fully
            skips, deepest = self._control(x, ports.control, scale, conditions, config)
            encoded = encoded.plus(skips, deepest)
        y = self._decode(encoded, conditions, config)
        return self._head(y)

    def _conditions(self, time: Array, ports: Ports, config: BlockConfig) -> Conditions:
        """Collect the conditions; tokens in the type of the matrix products."""
        if time.ndim == 2:
            # A position of the stem has the time of its first frame.
            time = time[:, :: self.stem[0]]
        tokens = ports.tokens
        if tokens is not None:
            tokens = tokens.astype(config.dtype)
        return Conditions(time, ports.vector, tokens, ports.tokens_mask)

    def _patchify(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j d"]:
        """Move the pixels of one position of the first level into its channels."""
        t, h, w = self.stem
        return rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=t, j=h, k=w)

    def _encode(
        self,
        x: Float[Array, "b t h w c"],
        ports: Ports,
        conditions: Conditions,
        config: BlockConfig,
    ) -> Encoded:
        """Run the way down and the middle."""
        if ports.concat is not None:
            x = jnp.concatenate([x, ports.concat.astype(x.dtype)], -1)
        encoder = Encoder(
            self.widths,
            self.layers,
            self.attention,
            self.motion_middle,
            self.remat,
            config,
            name="encoder",
        )
        return encoder(self._patchify(x), conditions)

    def _control(
        self,
        x: Float[Array, "b t h w c"],
        control: Float[Array, "b s H W m"],
        scale: Float[Array, "b"],
        conditions: Conditions,
        config: BlockConfig,
    ) -> tuple[list[Array], Float[Array, "b s i j d"]]:
        """Run the control branch: what it adds to (skips, deepest features)."""
        branch = ControlNet(
            self.control,
            self.hint,
            self.widths,
            self.layers,
            self.attention,
            self.remat,
            config,
            name="control",
        )
        return branch(self._patchify(x), conditions, control, scale)

    def _decode(
        self, encoded: Encoded, conditions: Conditions, config: BlockConfig
    ) -> Float[Array, "b s i j d"]:
        """Run the way up. Each layer also reads the skip of its level."""
        layer = layer_class(self.remat)
        skips = list(encoded.skips)
        y = encoded.deepest
        levels = zip(self.widths[::-1], self.attention[::-1], strict=True)
        for i, (width, attention) in enumerate(levels):
            motion = config.temporal.has_motion(attention)
            for j in range(self.layers + 1):
                y = jnp.concatenate([y, skips.pop()], -1)
                block = layer(width, attention, motion, config, name=f"up_{i}_{j}")
                y = block(y, encoded.emb, conditions.tokens, conditions.mask)
            if i < len(self.widths) - 1:
                conv = nn.Conv(width, (3, 3), dtype=config.dtype, name=f"up_{i}_conv")
                y = constrain(conv(upsample_nearest(y)), "b t h w c", context="t")
        return y

    def _head(self, y: Float[Array, "b s i j d"]) -> Float[Array, "b t h w c"]:
        """Project features to the prediction, in float32, zero at first."""
        t, h, w = self.stem
        y = nn.silu(GroupNorm(self.groups, 1e-5, self.joint_residual_norm, name="norm_out")(y))
        conv_out = nn.Conv(
            t * h * w * self.channels,
            (3, 3),
            dtype=jnp.float32,
            name="conv_out",
            kernel_init=nn.initializers.zeros,
        )
        y = conv_out(y)
        return rearrange(y, "b t h w (i j k c) -> b (t i) (h j) (w k) c", i=t, j=h, k=w)
