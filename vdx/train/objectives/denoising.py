"""The denoising objective: noise a clip, predict, compare."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vdx.config.build import ConfigError
from vdx.diffusion.losses import DenoisingLoss, FrameTimes, LossTerm, bin_by_time
from vdx.diffusion.process import Process
from vdx.models.adapters.lora import Adapted, Lora
from vdx.models.adapters.trainable import Trainable
from vdx.models.conditioning.base import Drop
from vdx.models.denoiser import Denoiser
from vdx.train.objectives.times import (
    BlockTimes,
    ClipTimes,
    FirstFrameTimes,
    TimeKeys,
    TimeSampler,
    TimeStrategy,
)
from vdx.types import Array, Batch, Params, PRNGKeyArray

__all__ = ["Draws", "Losses", "Objective"]

_FROM_CLIP = 0xDE  # folded into the key of a step, whose other draws split that key


class Draws(NamedTuple):
    """The random parts of one training step."""

    times: FrameTimes
    noise: Array  # like x0 [b t h w c], float32
    drop: Drop  # name of a signal -> bool [b], True where the signal is dropped


class Losses(NamedTuple):
    """The losses of one batch."""

    terms: dict[str, Array]  # name of a loss term -> its unweighted mean, a scalar
    bin_sums: Array  # [bins] summed losses by interval of time
    bin_counts: Array  # [bins] how many losses each interval has


@dataclasses.dataclass(frozen=True)
class Objective:
    """A denoiser, its process, the distribution of its times, and its loss.

    Raises ConfigError for `first_frame` together with `diffusion_forcing`.
    """

    model: Denoiser
    process: Process
    time_sampler: TimeSampler
    # Rows of LOSS_TERMS by name; their weighted sum is minimised.
    loss_terms: Mapping[str, LossTerm] = dataclasses.field(
        default_factory=lambda: {"denoising": DenoisingLoss()}
    )
    loss_bins: int = 5  # equal intervals of time that the loss is logged for
    mean: float = 0.0  # of the pixels, subtracted: a constant offset is slow to learn
    # The part of the network that is trained; None: all of it.
    trained_part: Lora | Trainable | None = None
    first_frame: float = 0.0  # share of the clips whose first latent frame is given
    diffusion_forcing: bool = False  # every block of a clip has a time of its own

    def __post_init__(self) -> None:
        if self.diffusion_forcing and self.first_frame:
            raise ConfigError(
                f"config.first_frame = {self.first_frame} sets times, and so does "
                "config.diffusion_forcing: choose one."
            )

    @functools.cached_property
    def time_strategy(self) -> TimeStrategy:
        """The way to draw times that the config's fields name."""
        if self.diffusion_forcing:
            # Blocks of tokens (see Transformer); without blocks every frame of tokens is one.
            tokens = self.model.block or 1
            return BlockTimes(self.model.backbone.patch[0] * tokens)
        if self.first_frame:
            return FirstFrameTimes(self.first_frame)
        return ClipTimes()

    def network_params(
        self, trained: Params, frozen: Params | None, key: PRNGKeyArray | None = None
    ) -> Params | Adapted:
        """Return the parameters that the network runs with.

        `key` is that of a training step, for the adapters' dropout; without it nothing is
        dropped.
        """
        if self.trained_part is None:
            return trained
        assert frozen is not None
        return self.trained_part.combine(frozen, trained, key)

    def clean(self, batch: Batch) -> Array:
        """Return x0 [b t h w c] in float32.

        Cached latents stay as they are. Pixels go from uint8 to [-1, 1], less their mean.
        """
        if "latents" in batch:
            return batch["latents"].astype(jnp.float32)
        return batch["video"].astype(jnp.float32) / 127.5 - 1.0 - self.mean

    def draw(self, x0: Array, key: PRNGKeyArray) -> Draws:
        """Draw times, noise and dropped signals from the key of a step."""
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        clips, frames = x0.shape[:2]
        times = self.time_strategy.draw(
            self.time_sampler,
            TimeKeys(step=key, times=time_key),
            (clips, frames),
            self.model.num_tokens(x0.shape),
        )
        noise = jax.random.normal(noise_key, x0.shape)
        return Draws(times, noise, self.model.random_drop(drop_key, clips))

    def with_clip_signals(self, batch: Batch, x0: Array, key: PRNGKeyArray) -> Batch:
        """Add the signals that are made of the clips themselves, such as known frames."""
        made = self.model.from_clip(jax.random.fold_in(key, _FROM_CLIP), x0)
        return {**batch, **made}

    def term_losses(
        self, params: Params | Adapted, batch: Batch, x0: Array, draws: Draws
    ) -> dict[str, Array]:
        """Return every term's unweighted losses, each in the shape of `times.report_t`."""
        times, noise, drop = draws
        x_t = self.process.add_noise(x0, noise, times.compact_t)
        network_time = self.process.network_time(times.compact_t)
        prediction = self.model.run(params, x_t, network_time, batch, drop, method="train_view")
        return {
            name: term(self.process, prediction, x0, noise, times)
            for name, term in self.loss_terms.items()
        }

    def weighted_sum(self, terms: Mapping[str, Array]) -> Array:
        """Sum values of the terms by their weights, in the order of `loss_terms`."""
        weighted = [term.weight * terms[name] for name, term in self.loss_terms.items()]
        return functools.reduce(jnp.add, weighted)

    def losses(self, params: Params | Adapted, batch: Batch, key: PRNGKeyArray) -> Losses:
        """Return the losses of a training step, with every draw from its key."""
        x0 = self.clean(batch)
        batch = self.with_clip_signals(batch, x0, key)
        draws = self.draw(x0, key)

        terms = self.term_losses(params, batch, x0, draws)

        each = self.weighted_sum(terms)  # b, or b t
        binned = bin_by_time(each.ravel(), draws.times.report_t.ravel(), self.loss_bins)
        means = {name: losses.mean() for name, losses in terms.items()}
        return Losses(means, binned.sums, binned.counts)
