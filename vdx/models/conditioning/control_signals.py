"""Signals that control a clip frame by frame: known frames, maps, actions."""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError
from vdx.config.ranges import Count, Fraction
from vdx.models.conditioning.base import ONE_VALUE, ClipShape, zero_dropped
from vdx.types import Array, Batch, Bool, Float, Ports, PRNGKeyArray


class KnownFrames(nn.Module):
    """Frames of the clip that are given, and a mask of them.

    Batch keys `known` [b t h w c], zero elsewhere, and `known_mask` [b t]. Port `concat`: the
    frames and the mask, as in Wan image-to-video (and Stable Video Diffusion, Blattmann et al.
    2023). Null value: no frame is known.

    In training the frames are those of the clip itself.
    """

    width: int  # not used
    channels: Count = 3  # of the clip
    first: Fraction = 1.0  # probability that the first frame is known in training
    last: Fraction = 0.5  # the same of the last frame, independently
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entries of one clip."""
        return {
            "known": jnp.zeros((1, *clip[:3], self.channels)),
            "known_mask": jnp.zeros((1, clip[0])),
        }

    @nn.nowrap
    def from_clip(self, key: PRNGKeyArray, x0: Float[Array, "b t h w c"]) -> Batch:
        """Return the entries of a training batch, from its clips."""
        b, t = x0.shape[:2]
        frame = jnp.arange(t)[None]
        first, last = jax.random.uniform(key, (2, b, 1))
        is_first = (frame == 0) & (first < self.first)
        is_last = (frame == t - 1) & (last < self.last)
        mask = is_first | is_last  # b t
        return {
            "known": jnp.where(mask[..., None, None, None], x0, 0.0),
            "known_mask": mask.astype(jnp.float32),
        }

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Concatenate the frames and the mask."""
        known = batch["known"]
        mask = batch["known_mask"][..., None, None, None]
        mask = jnp.broadcast_to(mask, (*known.shape[:4], 1)).astype(known.dtype)
        return Ports(concat=zero_dropped(jnp.concatenate([known, mask], -1), drop))


class Concat(nn.Module):
    """Channels that are concatenated to the noisy clip.

    An example is the latents of known frames, and a mask of these. Batch key `concat`
    [b t h w channels]. Port `concat`. Null value:
    zeros.
    """

    width: int  # not used
    channels: Count  # of the batch entry
    dropout: Fraction = 0.0  # probability that it is dropped for a clip in training

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        return {"concat": jnp.zeros((1, *clip[:3], self.channels))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Pass the channels on."""
        return Ports(concat=zero_dropped(batch["concat"], drop))


class Control(nn.Module):
    """The input of the control blocks (batch key `control` [b t h w channels]).

    In Wan VACE it is the latents of what stays, those of what changes, and a mask; in a U-Net it
    is maps of pixels. Port `control`. Null value: hints of weight 0.
    """

    width: int  # not used
    channels: Count  # of the batch entry
    side: Count = 1  # height and width, in those of the clip
    dropout: Fraction = 0.0  # probability that it is dropped for a clip in training

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        t, h, w = clip[:3]
        return {"control": jnp.zeros((1, t, h * self.side, w * self.side, self.channels))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Pass the input on, with weight 0 where it is dropped."""
        control_scale = 1.0 - drop.astype(jnp.float32)
        return Ports(control=zero_dropped(batch["control"], drop), control_scale=control_scale)


class DenseMap(nn.Module):
    """A map with values for every pixel of every frame, at the size of the clip.

    Batch key `key` [b t h w features]. A channel is added that is 1 where a map is given. Null
    value: zeros.
    """

    width: int  # not used
    port: Literal["concat", "control"] = "concat"  # "control" is read by control blocks
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training
    key: ClassVar[str] = ""  # of the batch
    features: ClassVar[int] = 1
    scale: ClassVar[float] = 1.0  # brings the map's values to about one

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        return {self.key: jnp.zeros((1, *clip[:3], self.features))}

    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Scale the map and add the channel of ones.

        Raises:
            ConfigError: the port is neither "concat" nor "control".
        """
        x = self.scale * batch[self.key].astype(jnp.float32)
        x = zero_dropped(jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1), drop)
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
    """An image of the skeleton in [0, 1] (batch key `pose` [b t h w 3])."""

    key = "pose"
    features = 3


class Flow(DenseMap):
    """Hints of optical flow (batch key `flow` [b t h w 3]).

    The channels are pixels to the right and down from each frame to the next, and 1 where a hint
    is given. All are 0 where none is.
    """

    key = "flow"
    features = 3


class Camera(DenseMap):
    """The camera's path as Plücker rays (batch key `camera` [b t h w 6]).

    The channels are the moment and the direction of each pixel's ray (He et al. 2024, CameraCtrl).
    """

    key = "camera"
    features = 6


class Actions(nn.Module):
    """An action at each frame (batch key `actions` int32 [b t], in 0 .. count - 1).

    For world models. Port `vector`, one for each frame. Null value: a learned vector.
    """

    width: int  # features of the network
    count: Count = 5  # kinds of actions
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        return {"actions": jnp.zeros((1, clip[0]), jnp.int32)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Embed the actions; the last row of the embedding is the null value."""
        embed = nn.Embed(
            self.count + 1, self.width, name="embed", embedding_init=nn.initializers.normal(0.5)
        )
        actions = jnp.where(drop[:, None], self.count, batch["actions"])
        return Ports(vector=embed(actions))
