"""Signals that steer a clip: known frames, a reference picture, dense maps, strength of motion,
actions. Rows of `conditioning.SIGNALS`; what they have in common is said there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.models.encoders.vision import VISION
from vdx.models.layers import MLP, EmbedMLP
from vdx.types import Array, Batch, Bool, Ports, PRNGKeyArray

Clip = tuple[int, ...]  # (t, h, w, c) of the noisy clip


def kept(x: Array, drop: Bool[Array, "b"]) -> Array:
    """float32 x, zero where dropped."""
    return jnp.where(drop.reshape(-1, *(1,) * (x.ndim - 1)), 0.0, x.astype(jnp.float32))


class KnownFrames(nn.Module):
    """Frames of the clip that are given (batch keys `known` [b t h w c], zero elsewhere, and
    `known_mask` [b t]). Port `concat`: the frames and the mask, as in Wan image-to-video (and
    Stable Video Diffusion, Blattmann et al. 2023). Null value: no frame is known.

    In training the frames are those of the clip itself: the first with probability `first`, the
    last with `last`, each on its own. `channels`: those of the clip.
    """

    width: int
    channels: int = 3
    first: float = 1.0
    last: float = 0.5
    dropout: float = 0.1

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {
            "known": jnp.zeros((1, *clip[:3], self.channels)),
            "known_mask": jnp.zeros((1, clip[0])),
        }

    @nn.nowrap
    def from_clip(self, key: PRNGKeyArray, x0: Array) -> Batch:
        """The entries of a training batch, from its clips x0 [b t h w c]."""
        b, t = x0.shape[:2]
        place, (first, last) = jnp.arange(t), jax.random.uniform(key, (2, b, 1))
        mask = ((place == 0) & (first < self.first)) | ((place == t - 1) & (last < self.last))
        return {
            "known": jnp.where(mask[..., None, None, None], x0, 0.0),
            "known_mask": mask.astype(jnp.float32),
        }

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        known, mask = batch["known"], batch["known_mask"]
        mask = jnp.broadcast_to(mask[..., None, None, None], (*known.shape[:4], 1))
        return Ports(concat=kept(jnp.concatenate([known, mask.astype(known.dtype)], -1), drop))


class Reference(nn.Module):
    """A picture of what the clip is to show (batch key `reference` uint8 [b h w 3]), read by an
    `encoder`, a row of VISION, that is trained with the denoiser. Port `image_tokens`.
    Null value: features of zero.
    """

    width: int
    encoder: Mapping[str, Any]
    height: int = 32
    columns: int = 32
    dropout: float = 0.1

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {"reference": jnp.zeros((1, self.height, self.columns, 3), jnp.uint8)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        picture = batch["reference"]
        if picture.shape[1:3] != (self.height, self.columns):
            raise ConfigError(
                f"The reference picture is {picture.shape[1:3]} (h, w); this model reads "
                f"config.model.signals.reference.height, columns = {self.height}, {self.columns}."
            )
        encoder = build(
            self.encoder, VISION, "config.model.signals.reference.encoder", name="encoder"
        )
        x = encoder(picture.astype(jnp.float32) / 127.5 - 1.0)
        return Ports(image_tokens=kept(nn.Dense(self.width, name="project")(x), drop))


class DenseMap(nn.Module):
    """A map that says something of every pixel of every frame (batch key `key`
    [b t h w features]), at the size of the clip. With a channel that is 1 where a map is given, at
    the port `concat`, or at `control`, which control blocks read. Null value: zeros.
    """

    width: int
    port: str = "concat"
    dropout: float = 0.1
    key = ""
    features = 1
    scale = 1.0  # brings the map's values to about one

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {self.key: jnp.zeros((1, *clip[:3], self.features))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        x = self.scale * batch[self.key].astype(jnp.float32)
        x = kept(jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1), drop)
        if self.port == "concat":
            return Ports(concat=x)
        if self.port == "control":
            return Ports(control=x, control_scale=1.0 - drop.astype(jnp.float32))
        raise ConfigError(
            f"config.model.signals.{self.key}.port = {self.port!r} is neither "
            "'concat' nor 'control'."
        )


class Depth(DenseMap):
    """Nearness in [0, 1], 1 nearest (batch key `depth` [b t h w 1])."""

    key = "depth"


class Pose(DenseMap):
    """A picture of the skeleton in [0, 1] (batch key `pose` [b t h w 3])."""

    key, features = "pose", 3


class Flow(DenseMap):
    """Hints of optical flow (batch key `flow` [b t h w 3]): pixels to the right and down from
    each frame to the next, and 1 where a hint is given; all is 0 where none is."""

    key, features = "flow", 3


class Camera(DenseMap):
    """The camera's path as Plücker rays (batch key `camera` [b t h w 6]): moment and direction of
    each pixel's ray (He et al. 2024, CameraCtrl)."""

    key, features = "camera", 6


class Actions(nn.Module):
    """What is done at each frame (batch key `actions` int32 [b t], in 0 .. count - 1), for world
    models. Port `vector`, one for each frame. Null value: a learned vector."""

    width: int
    count: int = 5
    dropout: float = 0.1

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {"actions": jnp.zeros((1, clip[0]), jnp.int32)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        embed = nn.Embed(
            self.count + 1, self.width, name="embed", embedding_init=nn.initializers.normal(0.5)
        )
        return Ports(vector=embed(jnp.where(drop[:, None], self.count, batch["actions"])))


class Scalar(nn.Module):
    """A number per clip, on a scale where doubling is one step. Port `vector`. Null value: a
    learned vector."""

    width: int
    dropout: float = 0.1
    key = ""
    floor = 0.0  # added before the logarithm, for numbers that may be 0

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {self.key: jnp.ones(1)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        value = jnp.log2(batch[self.key].astype(jnp.float32) + self.floor)
        # 100 a doubling: the sinusoid then tells neighbouring rates apart.
        emb = EmbedMLP(self.width, name="embed")(100.0 * value)
        null = self.param("null", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        return Ports(vector=jnp.where(drop[:, None], null, emb))


class FrameRate(Scalar):
    """Frames per second of the clip (batch key `fps`)."""

    key = "fps"


class FrameRateClass(nn.Module):
    """Whether the clip has 16 frames per second or another rate (batch key `fps`), as SkyReels-V2
    reads it. Port `modulation`. Null value: zeros."""

    width: int
    dropout: float = 0.0

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {"fps": jnp.ones(1)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        other = (jnp.round(batch["fps"]) != 16).astype(jnp.int32)
        x = MLP(self.width, "silu", out=6 * self.width, name="project")(
            nn.Embed(2, self.width, name="embed")(other)
        )
        return Ports(modulation=kept(x.reshape(-1, 6, self.width), drop))


class Duration(Scalar):
    """Number of pixel frames of the clip (batch key `num_frames`)."""

    key = "num_frames"


class Motion(Scalar):
    """Strength of motion (batch key `motion`), as vdx.data.motion measures it."""

    key, floor = "motion", 1.0


CONTROL_SIGNALS: dict[str, Callable[..., nn.Module]] = {
    "known_frames": KnownFrames,
    "reference": Reference,
    "depth": Depth,
    "pose": Pose,
    "flow": Flow,
    "camera": Camera,
    "actions": Actions,
    "motion": Motion,
    "fps": FrameRate,
    "fps_class": FrameRateClass,
    "num_frames": Duration,
}
