"""Signals of one number a clip: frame rate, duration, strength of motion."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.ranges import Fraction
from vdx.models.conditioning.base import ONE_VALUE, ClipShape, zero_dropped
from vdx.models.layers import MLP, EmbedMLP, along_last
from vdx.types import Array, Batch, Bool, Ports

STEP = 100.0  # of the sinusoid for a doubling, so that it resolves neighbouring rates


class Scalar(nn.Module):
    """A number per clip, on a scale where doubling is one step.

    Port `vector`. Null value: a learned vector.
    """

    width: int  # features of the network
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training
    key: ClassVar[str] = ""  # of the batch
    floor: ClassVar[float] = 0.0  # added before the logarithm, for numbers that may be 0

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        return {self.key: jnp.ones(1)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Embed the logarithm of the number."""
        value = jnp.log2(batch[self.key].astype(jnp.float32) + self.floor)
        emb = EmbedMLP(self.width, name="embed")(STEP * value)
        null = self.param("null", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        return Ports(vector=jnp.where(drop[:, None], along_last(null, emb), emb))


class FrameRate(Scalar):
    """Frames per second of the clip (batch key `fps`)."""

    key = "fps"


class Duration(Scalar):
    """Number of pixel frames of the clip (batch key `num_frames`)."""

    key = "num_frames"


class Motion(Scalar):
    """Strength of motion (batch key `motion`), as vdx.data.motion measures it."""

    key = "motion"
    floor = 1.0


class FrameRateClass(nn.Module):
    """A class of frame rates, 16 per second or another, as in SkyReels-V2.

    Batch key `fps`. Port `modulation`. Null value: zeros.
    """

    width: int  # features of the network
    dropout: Fraction = 0.0  # probability that it is dropped for a clip in training

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        return {"fps": jnp.ones(1)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Embed the class as a modulation of every block."""
        is_other = (jnp.round(batch["fps"]) != 16).astype(jnp.int32)
        x = nn.Embed(2, self.width, name="embed")(is_other)
        x = MLP(self.width, "silu", out=6 * self.width, name="project")(x)
        return Ports(modulation=zero_dropped(x.reshape(-1, 6, self.width), drop))
