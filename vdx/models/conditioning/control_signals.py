"""Signals that steer a clip: known frames, a reference picture, dense maps, strength of motion,
actions. Rows of `conditioning.SIGNALS`; what they have in common is said there.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError
from vdx.models.conditioning.base import Clip, kept
from vdx.types import Array, Batch, Bool, Ports, PRNGKeyArray


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


class Concat(nn.Module):
    """Channels beside the noisy clip (batch key `concat` [b t h w channels]), such as the latents
    of known frames and a mask that says which. Port `concat`. Null value: zeros."""

    width: int
    channels: int
    dropout: float = 0.0

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {"concat": jnp.zeros((1, *clip[:3], self.channels))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        return Ports(concat=kept(batch["concat"], drop))


class Control(nn.Module):
    """What control blocks read (batch key `control` [b t h w channels]), in Wan VACE the latents
    of what stays, of what changes, and a mask; in a U-Net maps of pixels. Port `control`. Null
    value: hints of weight 0.

    side: how many times as high and wide as the clip it is.
    """

    width: int
    channels: int
    side: int = 1
    dropout: float = 0.0

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        t, h, w = clip[:3]
        return {"control": jnp.zeros((1, t, h * self.side, w * self.side, self.channels))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        return Ports(
            control=kept(batch["control"], drop), control_scale=1.0 - drop.astype(jnp.float32)
        )
