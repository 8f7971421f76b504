"""Latents to frames, a few at a time: while a piece is computed, the one before it is used."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vdx.generate.video_io import to_uint8_there
from vdx.models.vae.chunks import first_piece_length
from vdx.models.vae.video_vae import VideoVAE
from vdx.types import Params


class Decoder:
    """Frames [t h w 3] of latents [t h w c] by a video VAE, piece by piece.

    Gives uint8 as `to_uint8` does, or, `exact`, float32 in [-1, 1], whole on every device of the
    current mesh. chunk: latent frames at a time. The memory does not grow with the clip: two
    pieces, and what one leaves for the next.
    """

    def __init__(self, vae: VideoVAE, params: Params, chunk: int, exact: bool = False):
        def piece(params, history, latents, first):
            pixels, state = vae.apply(
                {"params": params, "history": history},
                latents,
                first,
                method="decode_piece",
                mutable=["history"],
            )
            pixels = jnp.clip(pixels, -1, 1) if exact else to_uint8_there(pixels)
            return pixels, state["history"]

        self.params, self.chunk, self.rate = params, chunk, vae.rates[0]
        whole = None if jax.sharding.get_abstract_mesh().empty else (P(), None)
        self.first = jax.jit(
            lambda params, latents: piece(params, {}, latents, True), out_shardings=whole
        )
        self.later = jax.jit(
            lambda params, history, latents: piece(params, history, latents, False),
            out_shardings=whole,
        )

    def __call__(self, latents: np.ndarray) -> Iterator[np.ndarray]:
        """The pieces. The next one is under way when one is given."""
        head = first_piece_length(len(latents), self.chunk)
        ahead, history = self.first(self.params, latents[None, :head])
        for start in range(head, len(latents), self.chunk):
            done = ahead
            ahead, history = self.later(
                self.params, history, latents[None, start : start + self.chunk]
            )
            yield np.asarray(done)[0]
        yield np.asarray(ahead)[0]
