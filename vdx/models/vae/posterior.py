"""The distribution of latents that an encoder gives for a video."""

import flax.struct
import jax
import jax.numpy as jnp

from vdx.types import Array, Float, PRNGKeyArray

# Stable Diffusion's bounds: exp of either end is a normal float32.
MIN_LOGVAR = -30.0
MAX_LOGVAR = 20.0


class Posterior(flax.struct.PyTreeNode):
    """The normal distribution N(mean, exp(logvar)) of latents z given a video.

    A diffusion model sees normalised latents (z - shift) / scale. These are also what `decode`
    takes. `shift` and `scale` are numbers, or vectors over the channels z.
    """

    mean: Array  # [... h w z], before normalisation
    logvar: Array  # [... h w z], logarithm of the variance, before normalisation
    shift: Array  # [] or [z], the mean of the latents over a dataset
    scale: Array  # [] or [z], the standard deviation of the latents over a dataset

    @classmethod
    def from_moments(
        cls,
        moments: Float[Array, "*b m"],
        shift: float | Float[Array, "..."],
        scale: float | Float[Array, "..."],
    ) -> "Posterior":
        """Build the posterior from an encoder's output, m = 2z channels.

        The first half of the channels is the mean, the second half the logarithm of the variance.
        """
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        logvar = jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR)
        return cls(mean, logvar, jnp.float32(shift), jnp.float32(scale))

    def mode(self) -> Float[Array, "*b z"]:
        """Return the most probable latents, normalised."""
        return self._normalise(self.mean)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "*b z"]:
        """Draw latents from the posterior, normalised."""
        noise = jax.random.normal(key, self.mean.shape)
        return self._normalise(self.mean + jnp.exp(0.5 * self.logvar) * noise)

    def kl(self) -> Float[Array, "b"]:
        """Return the KL divergence of z from N(0, 1), in nats per clip.

        z is taken before normalisation.
        """
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar
        return 0.5 * terms.reshape(len(terms), -1).sum(-1)

    def _normalise(self, z: Float[Array, "*b z"]) -> Float[Array, "*b z"]:
        shift = jnp.broadcast_to(self.shift, z.shape)
        scale = jnp.broadcast_to(self.scale, z.shape)
        return (z - shift) / scale
