"""Time sampling: the distribution of the noise levels that training draws."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vdx.config.build import check_fields
from vdx.config.ranges import Count, Finite, Positive
from vdx.diffusion.process import shift_time
from vdx.types import Array, PRNGKeyArray


def _stratified(key: PRNGKeyArray, batch: int) -> Array:
    """Draw float32 [batch] uniform in (0, 1), one in each 1/batch.

    Source: Kingma et al. 2021, VDM.
    """
    offset_key, order_key = jax.random.split(key)
    offset = jax.random.uniform(offset_key, ())
    u = (offset + jnp.arange(batch) / batch) % 1.0
    # In a random order: otherwise a row of the batch (a device) would see one noise level only.
    return jnp.clip(jax.random.permutation(order_key, u), 1e-6, 1 - 1e-6)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Training times uniform in [0, 1], then shifted.

    The s of `shift_time` is `shift`, times sqrt(tokens / base_tokens) if `base_tokens` is set: a
    larger video needs more noise to hide the same content (Esser et al. 2024).
    """

    shift: Positive = 1.0  # s of `shift_time`; above 1: more training at high noise
    base_tokens: Count | None = None  # tokens of the clip for which `shift` alone is right

    def __post_init__(self) -> None:
        check_fields(self, "config.time_sampler")

    def shift_for(self, num_tokens: int) -> float:
        """Return the s of `shift_time` for a video of this many tokens."""
        ratio = num_tokens / self.base_tokens if self.base_tokens else 1.0
        return self.shift * math.sqrt(ratio)

    def quantile(self, u: Array) -> Array:
        """Return the inverse cumulative distribution at u, before the shift."""
        return u

    def sample(self, key: PRNGKeyArray, batch: int, num_tokens: int) -> Array:
        """Draw times float32 [batch], stratified so that gradients vary less."""
        return shift_time(self.quantile(_stratified(key, batch)), self.shift_for(num_tokens))


@dataclasses.dataclass(frozen=True)
class LogitNormal(Uniform):
    """Training times with logit(t) ~ N(mean, std^2), then shifted.

    Source: Esser et al. 2024, section 3.1.
    """

    mean: Finite = 0.0  # of logit(t); 0 centres training on t = 0.5
    std: Positive = 1.0  # of logit(t)

    def quantile(self, u: Array) -> Array:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))


TIME_SAMPLERS = {"uniform": Uniform, "logit_normal": LogitNormal}
