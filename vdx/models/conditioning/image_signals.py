"""Images."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.models.conditioning.base import Clip, kept
from vdx.models.encoders.vision import VISION
from vdx.models.layers import MLP, LayerNorm
from vdx.types import Array, Batch, Bool, Ports


class ImageTokens(nn.Module):
    """Features of images from a frozen encoder (batch key `image_tokens` [b m features]), as Wan
    reads CLIP's: norm, MLP, norm. Port `image_tokens`.

    positions: learned ones for so many tokens, if m is always that (Wan first-last-frame: those
    of both images in a row); 0: none. Null value: features of zero.
    """

    width: int
    features: int = 1280
    positions: int = 0
    dropout: float = 0.1

    @nn.nowrap
    def dummy_batch(self, clip: Clip = (1, 1, 1, 1)) -> Batch:
        return {"image_tokens": jnp.zeros((1, self.positions or 1, self.features))}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        x = kept(batch["image_tokens"], drop)
        if self.positions:
            if x.shape[1] != self.positions:
                raise ConfigError(
                    f"image_tokens has {x.shape[1]} tokens a clip; this model reads "
                    f"config.model.signals.image_tokens.positions = "
                    f"{self.positions}."
                )
            x = x + self.param(
                "position_table",
                nn.initializers.zeros,
                (self.positions, self.features),
                jnp.float32,
            )
        # The two norms have torch's default epsilon, unlike those of the blocks.
        x = LayerNorm(1e-5, name="norm_in")(x)
        x = MLP(self.features, "gelu_exact", out=self.width, name="project")(x)
        return Ports(image_tokens=LayerNorm(1e-5, name="norm_out")(x))


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
