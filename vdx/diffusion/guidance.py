"""Classifier-free guidance: one network, asked with and without its condition.

Guidance is linear, and at a fixed x_t every kind of prediction is affine in x0 with the same
coefficients for both answers, so it acts alike on noise, v, x0 and velocity.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdx.build import ConfigError
from vdx.diffusion.process import expand
from vdx.types import Array


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly the condition is followed.

    scale: null + scale (cond - null) (Ho & Salimans 2022); 1 is the condition alone.
    rescale: phi in [0, 1], pulls the contrast back to that of the condition (Lin et al. 2023).
    interval: times (low, high), ends included, where the scale holds; elsewhere it is 1
        (Kynkäänniemi et al. 2024).
    Raises ConfigError for values out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= self.rescale <= 1 or not low <= high:
            raise ConfigError(f"guidance: rescale = {self.rescale} must be in [0, 1] and "
                              f"interval = {self.interval} must be (low, high).")


def questions(cond: Any, null: Any, guidance: Guidance) -> Any:
    """What the network is asked with: `cond` alone or, with a scale, both in one batch."""
    if guidance.scale == 1.0:
        return cond
    given, empty = str(jax.tree.structure(cond)), str(jax.tree.structure(null))
    if given != empty:
        raise ValueError("Guidance needs the same signals in cond and null, but cond is "
                         f"{given} and null is {empty}.")
    return jax.tree.map(lambda c, n: jnp.concatenate([c, n]), cond, null)


def guided(network: Callable[[Array, Array, Any], Array], cond: Any, null: Any,
           guidance: Guidance) -> Callable[[Array, Array], Array]:
    """denoise(x_t, t) -> float32 prediction, from network(x_t, t, ports) -> prediction.

    `cond` and `null` are pytrees of the same structure, every leaf [b ...]. Both questions go
    through the network as one batch of 2b; scale 1 asks only the first. Raises ValueError when
    the structures differ.
    """
    ports = questions(cond, null, guidance)
    if guidance.scale == 1.0:
        return lambda x_t, t: network(x_t, t, ports).astype(jnp.float32)

    def denoise(x_t: Array, t: Array) -> Array:
        both = network(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), ports)
        with_cond, without = jnp.split(both.astype(jnp.float32), 2)
        return combine(with_cond, without, t, guidance)

    return denoise


def combine(with_cond: Array, without: Array, t: Array, guidance: Guidance) -> Array:
    """The guided prediction from the two answers [b t h w c] at times t [b] (or [b t])."""
    low, high = guidance.interval
    inside = (t >= low) & (t <= high)
    scale = expand(jnp.where(inside, guidance.scale, 1.0), with_cond)
    out = without + scale * (with_cond - without)
    if guidance.rescale == 0.0:
        return out
    axes = tuple(range(1, out.ndim))
    spread = jnp.std(out, axes, keepdims=True)
    matched = out * jnp.std(with_cond, axes, keepdims=True) / jnp.maximum(spread, 1e-8)
    return guidance.rescale * matched + (1 - guidance.rescale) * out
