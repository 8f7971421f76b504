"""Classifier-free guidance: one network, evaluated with and without its conditions.

Guidance is linear. At a fixed x_t every kind of prediction is affine in x0, with the same
coefficients for all branches, so guidance acts equally on noise, v, x0 and velocity.
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
    """The strength with which a sample follows its conditions.

    Branches a_0 ... a_n are predictions under growing sets of conditions. They combine to
    a_0 + sum_i scales[i] (a_{i+1} - a_i). One scale is classifier-free guidance (Ho & Salimans
    2022); several give each condition its own scale (Brooks et al. 2023, InstructPix2Pix).
    Raises ConfigError for values out of range.
    """

    scales: tuple[float, ...] = (1.0,)  # 1 everywhere is a_n alone
    rescale: float = 0.0  # phi in [0, 1]: restores the contrast of a_n (Lin et al. 2023)
    # Times (low, high), ends included, where the scales apply; elsewhere they are 1
    # (Kynkäänniemi et al. 2024).
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
        """The number of predictions that one guided evaluation computes."""
        return 1 if all(scale == 1.0 for scale in self.scales) else len(self.scales) + 1


def stack_branches(conditions: Sequence[Any], guidance: Guidance) -> Any:
    """Stacks the guidance branches along the batch.

    The order is clip-major, so that a sharded batch needs no communication. Returns the last
    branch alone if every scale is 1.

    conditions: pytrees of the same structure, every leaf [b ...], from the fewest conditions to
    all, one more than there are scales. Raises ValueError when structures or numbers differ.
    """
    if guidance.num_branches == 1:
        return conditions[-1]
    if len(conditions) != guidance.num_branches:
        raise ValueError(
            f"{len(guidance.scales)} guidance scales need {guidance.num_branches} branches, "
            f"but there are {len(conditions)}."
        )
    structures = [str(jax.tree.structure(c)) for c in conditions]
    if len(set(structures)) > 1:
        raise ValueError(f"Guidance needs the same signals in all its conditions: {structures}.")

    def stack(*leaves: Array) -> Array:
        stacked = jnp.stack(leaves, 1)  # [b branches ...]
        return stacked.reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(stack, *conditions)


def guided_denoiser(
    network: Callable[[Array, Array, Any], Array], conditions: Sequence[Any], guidance: Guidance
) -> Callable[[Array, Array], Array]:
    """Return denoise(x_t, t) -> guided float32 prediction.

    network(x_t, t, ports) -> prediction is evaluated once, on all branches. For `conditions` see
    `stack_branches`.
    """
    ports = stack_branches(conditions, guidance)
    n = guidance.num_branches
    if n == 1:
        return lambda x_t, t: network(x_t, t, ports).astype(jnp.float32)

    def denoise(x_t: Array, t: Array) -> Array:
        stacked = network(jnp.repeat(x_t, n, 0), jnp.repeat(t, n, 0), ports).astype(jnp.float32)
        branches = stacked.reshape(-1, n, *stacked.shape[1:])
        return combine([branches[:, i] for i in range(n)], t, guidance)

    return denoise


def combine(branches: Sequence[Array], t: Array, guidance: Guidance) -> Array:
    """Combine branches [b t h w c] at times t, [b] or [b t], to the guided prediction."""
    low, high = guidance.interval
    inside = (t >= low) & (t <= high)

    out = branches[0]
    for before, after, scale in zip(branches, branches[1:], guidance.scales, strict=False):
        out = out + expand(jnp.where(inside, scale, 1.0), after) * (after - before)
    if guidance.rescale == 0.0:
        return out

    axes = tuple(range(1, out.ndim))
    spread = jnp.std(out, axes, keepdims=True)
    matched = out * jnp.std(branches[-1], axes, keepdims=True) / jnp.maximum(spread, 1e-8)
    return guidance.rescale * matched + (1 - guidance.rescale) * out
