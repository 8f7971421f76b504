"""CLIP (Radford et al. 2021): frozen text and vision transformers.

The text transformer is causal. The text model gives AnimateDiff the features of its prompts. The
vision model (ViT-H of OpenCLIP) gives Wan's image-to-video those of its reference image. Each is
one stack of pre-norm layers after its embeddings.
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
from vdx.types import Array, Bool, DTypeLike, Float, Int

# Statistics of CLIP's training images: red, green and blue in [0, 1].
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

LARGEST_ID_EOS = 2  # `eos` of older files, which means: the end token is the largest id


class Features(NamedTuple):
    """Features at three depths, float32.

    `last` and `pooled` are None without the last layer.
    """

    last: Float[Array, "b l d"] | None  # of the last layer; of text: normalised
    penultimate: Float[Array, "b l d"]  # of the layer before
    pooled: Float[Array, "b d"] | None  # normalised, of the token that stands for the whole


class Layer(nn.Module):
    """Attention and MLP, each a residual after its norm.

    The layer also carries its input.
    """

    heads: int
    hidden: int  # features inside the MLP
    activation: str  # a row of ACTIVATIONS
    causal: bool  # a token attends to itself and those before it only
    eps: float  # of the norms
    dtype: DTypeLike  # of the matrix products

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "b l d"], Float[Array, "b l d"]],
        mask: Bool[Array, "b l"] | None,
    ) -> tuple[tuple[Float[Array, "b l d"], Float[Array, "b l d"]], None]:
        """Return ((output, input), None), the form that `nn.scan` carries on."""
        start, _ = carry
        attention = SelfAttention(self.heads, self.causal, self.dtype, name="attention")
        x = start + attention(LayerNorm(self.eps, name="norm_a")(start), mask)
        mlp = MLP(self.hidden, self.activation, self.dtype, name="mlp")
        x = x + mlp(LayerNorm(self.eps, name="norm_b")(x))
        return (constrain(x, "b l d"), start), None


class Encoder(nn.Module):
    """A stack of `Layer`, whose fields these are."""

    depth: int  # layers
    heads: int
    hidden: int
    activation: str
    causal: bool
    eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b l d"]]:
        """Return (features after the last layer, features after the one before it)."""
        # Parameters of all layers are stacked along a first axis.
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            check_constancy_invariants=False,  # it would trace the body twice
        )

        layers = scanned(
            self.heads,
            self.hidden,
            self.activation,
            self.causal,
            self.eps,
            self.dtype,
            name="layers",
        )

        # The carry is (features, features one layer before).
        (last, penultimate), _ = layers((x, x), mask)
        return last, penultimate


class CLIPTextModel(nn.Module):
    """The text tower. A token attends to itself and those before it.

    `pooled` is of the first end token. Raises ValueError for more than `positions` tokens.
    """

    vocabulary: int
    width: int  # d
    depth: int  # layers
    heads: int
    hidden: int  # features inside the MLPs
    positions: int = 77  # tokens of a prompt, at most
    activation: str = "quick_gelu"
    eps: float = 1e-5  # of the norms
    eos: int = 49407  # the end token; LARGEST_ID_EOS in files older than this field
    dtype: str = "float32"  # of the matrix products

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None) -> Features:
        """Return the features of token ids; `mask` is True on tokens, None if all are."""
        length = ids.shape[1]
        if length > self.positions:
            raise ValueError(
                f"{length} tokens, but this CLIP reads {self.positions}; cut the prompt."
            )

        # Embed. [b l d]
        x = nn.Embed(self.vocabulary, self.width, name="words")(ids).astype(jnp.float32)
        positions = self.param(
            "position_table",
            nn.initializers.normal(0.02),
            (self.positions, self.width),
            jnp.float32,
        )
        x = x + positions[None, :length]

        encoder = Encoder(
            self.depth,
            self.heads,
            self.hidden,
            self.activation,
            causal=True,
            eps=self.eps,
            dtype=jnp.dtype(self.dtype),
            name="encoder",
        )
        x, penultimate = encoder(x, mask)
        x = LayerNorm(self.eps, name="norm")(x)

        # As in OpenAI's code, the first of the largest ids ends the text.
        is_end = ids if self.eos == LARGEST_ID_EOS else ids == self.eos
        pooled = x[jnp.arange(len(x)), is_end.argmax(1)]
        return Features(x, penultimate, pooled)


class CLIPVisionModel(nn.Module):
    """The vision tower. Its features are over [class token, patches row by row].

    Raises ValueError for pixels that are not `image` x `image`.
    """

    width: int  # d
    depth: int  # layers
    heads: int
    hidden: int  # features inside the MLPs
    patch: int  # side of a patch, in pixels
    image: int = 224  # side of an image, in pixels
    activation: str = "quick_gelu"
    eps: float = 1e-5  # of the norms
    # False leaves out the last layer and all after it, parameters too: Wan reads only the
    # penultimate features.
    use_last: bool = True
    dtype: str = "float32"  # of the matrix products

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Features:
        """Return the features of pixels from `preprocess`."""
        if pixels.shape[1:] != (self.image, self.image, 3):
            raise ValueError(
                f"pixels are {pixels.shape}; this CLIP reads [b {self.image} "
                f"{self.image} 3]. Pass frames through `preprocess`."
            )

        # [b l d], the class token first.
        x = self._embed(pixels)
        encoder = Encoder(
            self.depth if self.use_last else self.depth - 1,
            self.heads,
            self.hidden,
            self.activation,
            causal=False,
            eps=self.eps,
            dtype=jnp.dtype(self.dtype),
            name="encoder",
        )

        x, penultimate = encoder(x, None)
        if not self.use_last:
            return Features(None, x, None)

        # The class token stands for the whole image.
        pooled = LayerNorm(self.eps, name="norm")(x[:, 0])
        return Features(x, penultimate, pooled)

    def _embed(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b l d"]:
        """Embed the patches behind a class token, with positions."""
        dtype = jnp.dtype(self.dtype)
        side = self.image // self.patch
        x = rearrange(pixels, "b (h i) (w j) c -> b (h w) (i j c)", h=side, w=side)
        x = nn.Dense(self.width, use_bias=False, name="patch", dtype=dtype)(x)
        class_token = self.param(
            "class_table", nn.initializers.normal(0.02), (self.width,), jnp.float32
        )
        positions = self.param(
            "position_table",
            nn.initializers.normal(0.02),
            (side * side + 1, self.width),
            jnp.float32,
        )

        class_tokens = jnp.broadcast_to(class_token, (len(x), 1, self.width))
        x = jnp.concatenate([class_tokens, x], 1) + positions[None]
        return LayerNorm(self.eps, name="norm_in")(x)


def preprocess(frames: Sequence[np.ndarray], size: int = 224) -> Float[np.ndarray, "b size size 3"]:
    """Resize frames, crop their centre and normalise their colours.

    The shorter side becomes `size` (bicubic), and MEAN and STD are those of CLIP. Runs on the host,
    as transformers' CLIPImageProcessor does and therefore as diffusers prepares Wan's images. Wan's
    own code squeezes the whole frame into the square instead. Raises ValueError for frames that are
    not uint8 [h w 3].
    """
    images = []
    for frame in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise ValueError(
                f"A frame is {frame.dtype} {frame.shape}; CLIP's images are uint8 [h w 3]."
            )

        # Resize.
        shorter = min(frame.shape[:2])
        h, w = (size * side // shorter for side in frame.shape[:2])
        resized = Image.fromarray(frame).resize((w, h), Image.Resampling.BICUBIC)

        # Crop the centre, and scale to [0, 1].
        top = (h - size) // 2
        left = (w - size) // 2
        crop = np.asarray(resized)[top : top + size, left : left + size]
        images.append(crop / np.float32(255))
    return (np.stack(images) - MEAN) / STD
