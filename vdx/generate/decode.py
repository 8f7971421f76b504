"""Decoding of latents in pieces, so that memory does not grow with the clip."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vdx.generate.video_io import check_finite, to_uint8_on_device
from vdx.models.vae.chunks import first_piece_length
from vdx.models.vae.video_vae import VideoVAE
from vdx.types import Array, Params


class Decoder:
    """Decodes latents [t h w c] with a video VAE into pieces of frames [t h w 3].

    Pieces are uint8 as `to_uint8` gives them, or float32 in [-1, 1] if `exact`, whole on every
    device of the current mesh. Memory holds two pieces and the history between them: while one
    piece is computed, the caller uses the one before.
    """

    def __init__(self, vae: VideoVAE, params: Params, chunk: int, exact: bool = False):
        """Prepare the two programs. chunk: latent frames decoded at a time."""

        def decode_piece(
            params: Params, history: Any, latents: Array, first: bool
        ) -> tuple[Array, Array, Any]:
            # The history holds what the causal convolutions need of the piece before.
            pixels, state = vae.apply(
                {"params": params, "history": history},
                latents,
                first,
                method="decode_piece",
                mutable=["history"],
            )

            # [1 t h w 3]; the conversion hides what is not finite.
            is_finite = jnp.isfinite(pixels).all()
            pixels = jnp.clip(pixels, -1, 1) if exact else to_uint8_on_device(pixels)
            return pixels, is_finite, state["history"]

        self.params = params
        self.chunk = chunk

        # Frames are replicated; the history stays as the compiler lays it out.
        replicated = None if jax.sharding.get_abstract_mesh().empty else (P(), P(), None)
        self.first = jax.jit(
            lambda params, latents: decode_piece(params, {}, latents, True),
            out_shardings=replicated,
        )
        self.later = jax.jit(
            lambda params, history, latents: decode_piece(params, history, latents, False),
            out_shardings=replicated,
        )

    def __call__(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the pieces; the next one is already dispatched when one is yielded.

        Raises NotFinite for pixels that are NaN or infinite.
        """
        head = first_piece_length(len(latents), self.chunk)
        *pending, history = self.first(self.params, latents[None, :head])
        for start in range(head, len(latents), self.chunk):
            done = pending
            piece = latents[None, start : start + self.chunk]
            *pending, history = self.later(self.params, history, piece)
            yield _checked(*done)
        yield _checked(*pending)


def _checked(pixels: Array, is_finite: Array) -> np.ndarray:
    """Return a piece [t h w 3] on the host."""
    check_finite(is_finite)
    return np.asarray(pixels)[0]
