"""CLIP (Radford et al. 2021): a causal text transformer and a vision transformer, frozen.

The text model gives AnimateDiff its words; the vision model (ViT-H of OpenCLIP) gives Wan's image
to video its reference image. Both are one stack of pre-norm layers between their embeddings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from PIL import Image

from vdx.models.attention.layers import SelfAttention
from vdx.models.layers import MLP, LayerNorm
from vdx.parallel import constrain
from vdx.types import Array, Bool, DTypeLike, Float, Int, UInt8

# Of the pictures that CLIP was trained on, red, green and blue in [0, 1].
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class Features(NamedTuple):
    """last [b l d]: of the last layer (text: normalised). penultimate [b l d]: of the layer
    before. pooled [b d]: normalised, of the token that stands for the whole. All float32; last
    and pooled are None if the last layer is not used."""

    last: Array | None
    penultimate: Array
    pooled: Array | None


class Layer(nn.Module):
    """Attention and MLP, each a residual behind its norm; also carries what came in."""

    heads: int
    hidden: int
    activation: str
    causal: bool
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, carry: tuple[Array, Array], mask: Bool[Array, "b l"] | None):
        x = before = carry[0]
        x = x + SelfAttention(self.heads, self.causal, self.dtype, name="attention")(
            LayerNorm(self.eps, name="norm_a")(x), mask
        )
        x = x + MLP(self.hidden, self.activation, self.dtype, name="mlp")(
            LayerNorm(self.eps, name="norm_b")(x)
        )
        return (constrain(x, "b l d"), before), None


class Encoder(nn.Module):
    """x [b l d] -> (after the last layer, after the one before it), both [b l d]."""

    depth: int
    layer: dict

    @nn.compact
    def __call__(self, x: Array, mask: Bool[Array, "b l"] | None) -> tuple[Array, Array]:
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        out, _ = layers(**self.layer, name="layers")((x, x), mask)
        return out


class CLIPTextModel(nn.Module):
    """ids int32 [b l], mask bool [b l] or None -> Features; a token sees those before it.

    Pooled is at the first end token `eos`; files from before that was written down say eos = 2
    and mean the largest id, as in OpenAI's code. Raises ValueError for more than `positions`
    tokens. dtype: compute type of the matrix products.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    hidden: int
    positions: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5
    eos: int = 49407
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Features:
        length = ids.shape[1]
        if length > self.positions:
            raise ValueError(
                f"{length} tokens, but this CLIP reads {self.positions}; cut the prompt."
            )
        x = nn.Embed(self.vocabulary, self.width, name="words")(ids).astype(jnp.float32)
        places = self.param(
            "position_table",
            nn.initializers.normal(0.02),
            (self.positions, self.width),
            jnp.float32,
        )
        layer = dict(
            heads=self.heads,
            hidden=self.hidden,
            activation=self.activation,
            causal=True,
            eps=self.eps,
            dtype=jnp.dtype(self.dtype),
        )
        x, before = Encoder(self.depth, layer, name="encoder")(x + places[:length], mask)
        x = LayerNorm(self.eps, name="norm")(x)
        end = (ids if self.eos == 2 else ids == self.eos).argmax(1)
        return Features(x, before, x[jnp.arange(len(x)), end])


class CLIPVisionModel(nn.Module):
    """pixels float [b h w 3] of `preprocess` -> Features over [class token, patches row by row].

    use_last = False leaves out the last layer and what follows it, parameters too: Wan reads
    only the penultimate features. Raises ValueError for pixels that are not `image` x `image`.
    dtype: compute type of the matrix products.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    image: int = 224
    activation: str = "quick_gelu"
    eps: float = 1e-5
    use_last: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Features:
        if pixels.shape[1:] != (self.image, self.image, 3):
            raise ValueError(
                f"pixels are {pixels.shape}; this CLIP reads [b {self.image} "
                f"{self.image} 3]. Pass frames through `preprocess`."
            )
        dtype, side = jnp.dtype(self.dtype), self.image // self.patch
        x = rearrange(pixels, "b (h i) (w j) c -> b (h w) (i j c)", h=side, w=side)
        x = nn.Dense(self.width, use_bias=False, name="patch", dtype=dtype)(x)
        whole = self.param("class_table", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        places = self.param(
            "position_table",
            nn.initializers.normal(0.02),
            (side * side + 1, self.width),
            jnp.float32,
        )
        whole = jnp.broadcast_to(whole, (len(x), 1, self.width))
        x = LayerNorm(self.eps, name="norm_in")(jnp.concatenate([whole, x], 1) + places)
        layer = dict(
            heads=self.heads,
            hidden=self.hidden,
            activation=self.activation,
            causal=False,
            eps=self.eps,
            dtype=dtype,
        )
        x, before = Encoder(self.depth - (not self.use_last), layer, name="encoder")(x, None)
        if not self.use_last:
            return Features(None, x, None)
        return Features(x, before, LayerNorm(self.eps, name="norm")(x[:, 0]))


def preprocess(frames: Sequence[UInt8[np.ndarray, "h w 3"]], size: int = 224) -> np.ndarray:
    """float32 [b size size 3]: the shorter side to `size` (bicubic), centre, MEAN and STD.

    On the host, as transformers' CLIPImageProcessor, and so as diffusers prepares Wan's images;
    Wan's own code squeezes the whole frame into the square instead. Raises ValueError for frames
    that are not uint8 [h w 3].
    """
    out = []
    for frame in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(
                f"A frame is {frame.dtype} {frame.shape}; CLIP's pictures are uint8 [h w 3]."
            )
        sides = frame.shape[:2]
        h, w = (size * n // min(sides) for n in sides)
        picture = np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC))
        top, left = (h - size) // 2, (w - size) // 2
        out.append(picture[top : top + size, left : left + size] / np.float32(255))
    return (np.stack(out) - MEAN) / STD
