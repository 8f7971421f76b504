"""Signals of one number a clip."""

import flax.linen as nn
import jax.numpy as jnp

from vdx.models.conditioning.base import Clip, kept
from vdx.models.layers import MLP, EmbedMLP
from vdx.types import Array, Batch, Bool, Ports


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
