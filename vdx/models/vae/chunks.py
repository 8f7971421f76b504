"""A causal function of a whole clip, computed piece by piece in bounded memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vdx.types import Array, Float

# step(history, piece, first) -> (output, history). The history is a flax collection.
Step = Callable[[Any, Array, bool], tuple[Array, Any]]


class FrameRates(NamedTuple):
    """Frames of a function's input and output per latent frame after the first.

    The first latent frame is one frame of both.
    """

    inputs: int
    outputs: int


def first_piece_length(latents: int, chunk: int) -> int:
    """Return the latent frames of a clip's first piece.

    It takes the remainder, so that all later pieces have `chunk` frames.
    """
    return 1 + (latents - 1) % chunk


def causal_chunks(
    step: Step, x: Float[Array, "b t ..."], chunk: int, rates: FrameRates
) -> Float[Array, "b s ..."]:
    """Run `step` over a clip, `chunk` latent frames at a time.

    The first piece takes the remainder, so that all later ones have one size: they are one loop,
    whose memory does not depend on the clip's length. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} latent frames must be positive.")

    # Sizes and places, in frames of the input and of the output.
    latents = 1 + (x.shape[1] - 1) // rates.inputs
    head = first_piece_length(latents, chunk)
    input_start = 1 + (head - 1) * rates.inputs
    output_start = 1 + (head - 1) * rates.outputs

    # The first piece.
    y, history = step({}, x[:, :input_start], True)
    if head == latents:
        return y

    # Room for the whole output, which the loop fills.
    frames = 1 + (latents - 1) * rates.outputs
    out = jnp.zeros((len(y), frames, *y.shape[2:]), y.dtype)
    out = jax.lax.dynamic_update_slice_in_dim(out, y, 0, 1)

    def body(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        history, out = carry
        start = input_start + i * chunk * rates.inputs
        piece = jax.lax.dynamic_slice_in_dim(x, start, chunk * rates.inputs, 1)
        y, history = step(history, piece, False)
        start = output_start + i * chunk * rates.outputs
        return history, jax.lax.dynamic_update_slice_in_dim(out, y, start, 1)

    # Pieces of one size.
    _, out = jax.lax.fori_loop(0, (latents - head) // chunk, body, (history, out))
    return out
