"""Classifier-free guidance: one network, asked with and without its condition.

Guidance is linear, and at a fixed x_t every kind of prediction is affine in x0 with the same
coefficients for both answers, so it acts alike on noise, v, x0 and velocity.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError
from vdx.diffusion.process import expand
from vdx.types import Array


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly conditions are followed.

    scales: of answers a_0 ... a_n under ever more conditions,
        a_0 + sum_i scales[i] (a_{i+1} - a_i). One is classifier-free guidance (Ho & Salimans
        2022), several give each condition a scale of its own (Brooks et al. 2023,
        InstructPix2Pix); 1 everywhere is a_n alone.
    rescale: phi in [0, 1], pulls the contrast back to that of a_n (Lin et al. 2023).
    interval: times (low, high), ends included, where the scales hold; elsewhere they are 1
        (Kynkäänniemi et al. 2024).
    Raises ConfigError for values out of range.
    """

    scales: tuple[float, ...] = (1.0,)
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= self.rescale <= 1 or not low <= high:
            raise ConfigError(
                f"guidance: rescale = {self.rescale} must be in [0, 1] and "
                f"interval = {self.interval} must be (low, high)."
            )

    @property
    def num_branches(self) -> int:
        """How many the network gives."""
        return 1 if all(scale == 1.0 for scale in self.scales) else len(self.scales) + 1


def stack_branches(conditions: Sequence[Any], guidance: Guidance) -> Any:
    """All that the network is asked with, in one batch, the questions of a clip side by side (on a
    mesh they then are where the clip is, and nothing is sent); the last alone if every scale is 1.

    conditions: pytrees of the same structure, every leaf [b ...], from the fewest conditions to
    all, one more than there are scales. Raises ValueError when structures or numbers differ.
    """
    if guidance.num_branches == 1:
        return conditions[-1]
    if len(conditions) != guidance.num_branches:
        raise ValueError(
            f"{len(guidance.scales)} guidance scales lead from one answer to the "
            f"next of {guidance.num_branches}, but there are {len(conditions)}."
        )
    structures = [str(jax.tree.structure(c)) for c in conditions]
    if len(set(structures)) > 1:
        raise ValueError(f"Guidance needs the same signals in all its conditions: {structures}.")
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *conditions
    )


def guided_denoiser(
    network: Callable[[Array, Array, Any], Array], conditions: Sequence[Any], guidance: Guidance
) -> Callable[[Array, Array], Array]:
    """denoise(x_t, t) -> float32 prediction, from network(x_t, t, ports) -> prediction; for
    conditions see `questions`."""
    ports, n = stack_branches(conditions, guidance), guidance.num_branches
    if n == 1:
        return lambda x_t, t: network(x_t, t, ports).astype(jnp.float32)

    def denoise(x_t: Array, t: Array) -> Array:
        answers = network(jnp.repeat(x_t, n, 0), jnp.repeat(t, n, 0), ports).astype(jnp.float32)
        answers = answers.reshape(-1, n, *answers.shape[1:])
        return combine([answers[:, i] for i in range(n)], t, guidance)

    return denoise


def combine(answers: Sequence[Array], t: Array, guidance: Guidance) -> Array:
    """The guided prediction from the answers [b t h w c] at times t [b] (or [b t])."""
    low, high = guidance.interval
    inside, out = (t >= low) & (t <= high), answers[0]
    for before, after, scale in zip(answers, answers[1:], guidance.scales, strict=False):
        out = out + expand(jnp.where(inside, scale, 1.0), after) * (after - before)
    if guidance.rescale == 0.0:
        return out
    axes = tuple(range(1, out.ndim))
    spread = jnp.std(out, axes, keepdims=True)
    matched = out * jnp.std(answers[-1], axes, keepdims=True) / jnp.maximum(spread, 1e-8)
    return guidance.rescale * matched + (1 - guidance.rescale) * out
