"""Signals of images, read by cross-attention."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vdx.config.build import ConfigError, build
from vdx.config.ranges import Count, Fraction, Index
from vdx.models.conditioning.base import ONE_VALUE, ClipShape, zero_dropped
from vdx.models.encoders.vision import VISION
from vdx.models.layers import MLP, LayerNorm
from vdx.types import Array, Batch, Bool, Ports

TORCH_EPS = 1e-5  # of Wan's norms here, torch's default, unlike those of the blocks


class ImageTokens(nn.Module):
    """Features of images from a frozen encoder.

    Batch key `image_tokens` [b m features]. They pass through norm, MLP and norm, as CLIP's do in
    Wan. Port `image_tokens`. Null value: features of zero.
    """

    width: int  # features of the network
    features: Count = 1280  # of an image token; CLIP ViT-H
    # Learned positions for this many tokens, if m is always that (Wan first-last-frame: those of
    # both images in a row). 0: none.
    positions: Index = 0
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        return {"image_tokens": jnp.zeros((1, self.positions or 1, self.features))}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Project image tokens to the features of the network.

        Raises:
            ConfigError: the number of tokens is not that of the positions.
        """
        x = zero_dropped(batch["image_tokens"], drop)  # b m features
        if self.positions:
            if x.shape[1] != self.positions:
                raise ConfigError(
                    f"image_tokens has {x.shape[1]} tokens a clip; this model reads "
                    f"config.model.signals.image_tokens.positions = {self.positions}."
                )
            table = self.param(
                "position_table",
                nn.initializers.zeros,
                (self.positions, self.features),
                jnp.float32,
            )
            x = x + table[None]

        x = LayerNorm(TORCH_EPS, name="norm_in")(x)
        x = MLP(self.features, "gelu_exact", out=self.width, name="project")(x)
        return Ports(image_tokens=LayerNorm(TORCH_EPS, name="norm_out")(x))


class Reference(nn.Module):
    """An image of the content that the clip must show.

    Batch key `reference` uint8 [b h w 3]. The encoder is trained with the denoiser. Port
    `image_tokens`. Null value: features of zero.
    """

    width: int  # features of the network
    encoder: Mapping[str, Any]  # a row of VISION with its fields
    height: Count = 32  # of the image, in pixels
    columns: Count = 32  # its width, in pixels
    dropout: Fraction = 0.1  # probability that it is dropped for a clip in training

    @nn.nowrap
    def dummy_batch(self, clip: ClipShape = ONE_VALUE) -> Batch:
        """Return the entry of one clip."""
        return {"reference": jnp.zeros((1, self.height, self.columns, 3), jnp.uint8)}

    @nn.compact
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Ports:
        """Encode the image.

        Raises:
            ConfigError: the image has another size than the model's.
        """
        image = batch["reference"]
        if image.shape[1:3] != (self.height, self.columns):
            raise ConfigError(
                f"The reference image is {image.shape[1:3]} (h, w); this model reads "
                f"config.model.signals.reference.height, columns = {self.height}, {self.columns}."
            )

        # Pixels in [-1, 1] -> features [b m width].
        where = "config.model.signals.reference.encoder"
        encoder = build(self.encoder, VISION, where, name="encoder")
        x = encoder(image.astype(jnp.float32) / 127.5 - 1.0)
        x = nn.Dense(self.width, name="project")(x)
        return Ports(image_tokens=zero_dropped(x, drop))
