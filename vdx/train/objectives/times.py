"""Strategies that draw the diffusion times of a batch of clips.

A strategy decides which frames share a time and which frames are learned from. It states both
in `FrameTimes`, so that the loss has one path.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from vdx.diffusion.losses import FrameTimes, shared_times
from vdx.types import Array, PRNGKeyArray

__all__ = [
    "BlockTimes",
    "ClipTimes",
    "FirstFrameTimes",
    "TimeKeys",
    "TimeSampler",
    "TimeStrategy",
    "give_first_frame",
]

_FIRST_FRAME = 0xF1  # folded into the key of a step, whose other draws split that key


class TimeSampler(Protocol):
    """The distribution of diffusion times in training, a row of TIME_SAMPLERS."""

    def sample(self, key: PRNGKeyArray, batch: int, num_tokens: int) -> Array:
        """Return times [batch] for clips of `num_tokens` tokens."""
        ...


class TimeKeys(NamedTuple):
    """The keys that the times of one step are drawn from."""

    step: PRNGKeyArray  # the key of the step, to fold constants into
    times: PRNGKeyArray  # the share of it that only times use


class TimeStrategy(Protocol):
    """A way to draw the times of a batch of clips."""

    def draw(
        self, sampler: TimeSampler, keys: TimeKeys, shape: tuple[int, int], num_tokens: int
    ) -> FrameTimes:
        """Draw times for `shape` = (clips, frames), of `num_tokens` tokens a clip."""
        ...


@dataclasses.dataclass(frozen=True)
class ClipTimes:
    """One time for each clip."""

    def draw(
        self, sampler: TimeSampler, keys: TimeKeys, shape: tuple[int, int], num_tokens: int
    ) -> FrameTimes:
        """Draw a time for each clip."""
        clips, frames = shape
        return shared_times(sampler.sample(keys.times, clips, num_tokens), frames)


@dataclasses.dataclass(frozen=True)
class FirstFrameTimes:
    """One time for each clip; some clips are to continue their given first frame."""

    share: float  # of the clips whose first frame is given

    def draw(
        self, sampler: TimeSampler, keys: TimeKeys, shape: tuple[int, int], num_tokens: int
    ) -> FrameTimes:
        """Draw the times, then the clips whose first frame is given."""
        times = ClipTimes().draw(sampler, keys, shape, num_tokens)
        key = jax.random.fold_in(keys.step, _FIRST_FRAME)
        is_given = jax.random.bernoulli(key, self.share, shape[:1])  # b
        return give_first_frame(times, is_given)


@dataclasses.dataclass(frozen=True)
class BlockTimes:
    """One time for each block of frames: diffusion forcing (Chen et al. 2024).

    A noisy block learns to follow clean ones.
    """

    block: int  # latent frames of a block; the last block of a clip may be shorter

    def draw(
        self, sampler: TimeSampler, keys: TimeKeys, shape: tuple[int, int], num_tokens: int
    ) -> FrameTimes:
        """Draw a time for each block and repeat it over the block's frames."""
        clips, frames = shape
        blocks = -(-frames // self.block)  # rounded up
        per_block = sampler.sample(keys.times, clips * blocks, num_tokens).reshape(clips, blocks)
        t = jnp.repeat(per_block, self.block, axis=1)[:, :frames]  # b t
        return FrameTimes(t=t, loss_mask=jnp.ones(shape, bool), compact_t=t, report_t=t)


def give_first_frame(times: FrameTimes, is_given: Array) -> FrameTimes:
    """Set the first frame of some clips to time 0, and take it out of the loss.

    `is_given` is bool [b]. An image, a clip of one frame, is left as it is: nothing would be
    learned from it. Wan 2.2 TI2V is trained so.
    """
    frames = times.t.shape[1]
    is_first = (jnp.arange(frames) == 0) & (frames > 1)
    loss_mask = ~(is_given[:, None] & is_first)  # b t
    t = jnp.where(loss_mask, times.t, 0.0)
    return FrameTimes(t, loss_mask, compact_t=t, report_t=times.report_t, masked=True)
