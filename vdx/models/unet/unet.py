"""U-Nets: of images (Stable Diffusion 1.5), with motion modules (AnimateDiff), 3D (ModelScope).

References: Rombach et al. 2022; Guo et al. 2023, AnimateDiff; Wang et al. 2023, ModelScope. Their
weights, as diffusers has them, are configurations of this class (vdx.interop.unet).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vdx.config.build import ConfigError, lookup
from vdx.flops import traced
from vdx.models.image_blocks import GroupNorm
from vdx.models.transformer import REMAT
from vdx.models.unet.blocks import Common, Encoder, layer_of, temporal_of
from vdx.models.unet.controlnet import CONTROLS, ControlNet
from vdx.models.vae.blocks import double
from vdx.parallel import constrain
from vdx.types import Array, Float, Ports


class UNet(nn.Module):
    """denoiser(x_t [b t h w c], time [b], ports) -> prediction [b t h w c].

    `time` may also be [b t], one for each frame. Without a temporal part the frames of a clip are
    as many images.

    channels: of the prediction. widths: features of each level, a level being half the size of
    the one before. layers: residuals of a level on the way down; one more on the way up.
    attention: which levels attend, within a frame and to the text.
    heads: of every attention. head_width: if given, attention at width w has w / head_width heads
    instead; in motion modules too if `temporal` is "3d". groups: of the group norms.
    temporal: a row of TEMPORAL, or a spec {"name": row of MIXERS, **fields}, motion modules
    around that mixer. joint_norm: motion modules normalise all frames of a clip at once, as
    diffusers does, or each by itself, as AnimateDiff's own code does. motion_middle: whether the
    middle has one. A fresh motion module changes nothing.
    stem: frames, rows and columns that are one place of the first level.
    control: a row of CONTROLS, a branch that reads the port `control`, or "none"; hint: widths of
    the convolutions of its maps, which are 2^(len(hint) - 1) times as high and wide as the clip.
    remat: a row of REMAT. dtype: compute type of the matrix products.
    """

    channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    heads: int = 8
    head_width: int = 0
    groups: int = 32
    temporal: str | Mapping[str, Any] = "none"
    joint_norm: bool = True
    motion_middle: bool = True
    stem: tuple[int, int, int] = (1, 1, 1)
    control: str = "none"
    hint: tuple[int, ...] = (16, 32, 96, 256)
    remat: str = "none"
    dtype: str = "float32"

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns that are one place of the deepest level."""
        (t, h, w), times = self.stem, 2 ** (len(self.widths) - 1)
        return t, h * times, w * times

    def dims(self) -> tuple[int, Common]:
        """(features that conditions are projected to, what all blocks share), checked."""
        temporal = temporal_of(self.temporal)
        common = Common(
            self.heads,
            self.head_width,
            self.groups,
            self.joint_norm,
            temporal,
            jnp.dtype(self.dtype),
        )
        lookup(self.remat, REMAT, "model.remat")
        lookup(self.control, {"none": None, **CONTROLS}, "model.control")
        if len(self.attention) != len(self.widths) or not self.widths:
            raise ConfigError(
                f"model.attention = {self.attention} says it for each of the levels "
                f"model.widths = {self.widths}."
            )
        for width in self.widths:
            parts = {"groups": self.groups, "heads": self.heads, "head_width": self.head_width or 1}
            for name, part in parts.items():
                if width % part:
                    raise ConfigError(
                        f"model.widths = {self.widths} are not multiples of model.{name} = {part}."
                    )
        return 4 * self.widths[0], common

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Places of the first level of a clip [t h w c]; raises ValueError if the levels do not
        divide it."""
        if any(n % p for n, p in zip(shape[:3], self.patch, strict=True)):
            raise ValueError(
                f"A clip of {shape[:3]} (t, h, w) does not divide into the levels of "
                f"this U-Net: choose sizes that are multiples of {self.patch}."
            )
        t, h, w = (n // p for n, p in zip(shape[:3], self.stem, strict=True))
        return t, h, w

    @nn.nowrap
    def flops(self, shape: tuple[int, ...], ports: Ports) -> float:
        """Operations of the matrix products and convolutions of one forward pass of one clip
        [t h w c], counted in the traced network. ports: of a batch of one; shapes are enough."""
        x, time = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, *shape), (1,)))
        params = jax.eval_shape(self.init, jax.random.key(0), x, time, ports)
        return traced(self.apply, params, x, time, ports)

    def check(self, x: Array, time: Array, ports: Ports) -> None:
        """Raises ValueError for sizes that do not fit and ports that a U-Net does not have."""
        t, h, w = self.grid(x.shape[1:])
        if time.shape not in (x.shape[:1], x.shape[:2]):
            raise ValueError(
                f"time is {time.shape}; a clip of {x.shape[:2]} (b, t) needs one time "
                "for each clip [b] or for each frame [b t]."
            )
        absent = ["image_tokens", "add"] + ["control"] * (self.control == "none")
        for port in absent:
            if getattr(ports, port) is not None:
                raise ConfigError(
                    f"This U-Net has no port {port!r}: take the signal that gives it "
                    "out of config.model.signals."
                )
        if self.control == "none":
            return
        if ports.control is None:
            raise ConfigError(
                f"model.control = {self.control!r} needs the signal config.model.signals.control."
            )
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
        time: Float[Array, "b"] | Float[Array, "b t"],
        ports: Ports,
    ) -> Float[Array, "b t h w c"]:
        _, common = self.dims()
        self.check(x, time, ports)
        st, sh, sw = self.stem
        time = time if time.ndim == 1 else time[:, ::st]
        tokens = None if ports.tokens is None else ports.tokens.astype(common.dtype)

        def places(x: Array) -> Array:
            return rearrange(x, "b (t i) (h j) (w k) c -> b t h w (i j k c)", i=st, j=sh, k=sw)

        conditions: dict[str, Any] = dict(
            time=time, vector=ports.vector, tokens=tokens, mask=ports.tokens_mask
        )
        clip = x if ports.concat is None else jnp.concatenate([x, ports.concat.astype(x.dtype)], -1)
        emb, skips, y = Encoder(
            self.widths,
            self.layers,
            self.attention,
            self.motion_middle,
            self.remat,
            common,
            name="encoder",
        )(places(clip), **conditions)
        if ports.control is not None:
            scale = jnp.ones(len(x)) if ports.control_scale is None else ports.control_scale
            more, deepest = ControlNet(
                self.control,
                self.hint,
                self.widths,
                self.layers,
                self.attention,
                self.remat,
                common,
                name="control",
            )(places(x), **conditions, control=ports.control, scale=scale)
            skips, y = [a + b for a, b in zip(skips, more, strict=True)], y + deepest
        layer, temporal, levels = layer_of(self.remat), common.temporal, len(self.widths)
        for i, width, attention in zip(
            range(levels), self.widths[::-1], self.attention[::-1], strict=True
        ):
            motion = temporal.motion and (attention or temporal.everywhere)
            for j in range(self.layers + 1):
                y = layer(width, attention, motion, common, name=f"up_{i}_{j}")(
                    jnp.concatenate([y, skips.pop()], -1), emb, tokens, ports.tokens_mask
                )
            if i < levels - 1:
                y = nn.Conv(width, (3, 3), dtype=common.dtype, name=f"up_{i}_conv")(double(y))
                y = constrain(y, "b t h w c", context="t")
        y = nn.silu(GroupNorm(self.groups, 1e-5, name="norm_out")(y))
        y = nn.Conv(
            st * sh * sw * self.channels,
            (3, 3),
            dtype=jnp.float32,
            name="conv_out",
            kernel_init=nn.initializers.zeros,
        )(y)
        return rearrange(y, "b t h w (i j k c) -> b (t i) (h j) (w k) c", i=st, j=sh, k=sw)
