"""Optimizers: AdamW and Muon, with schedule, clipping and a decay mask."""

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any

import jax
import optax
import optax.contrib

from vdx.config.build import check_fields
from vdx.config.ranges import Count, Decay, Fraction, Index, NonNegative, OneOf, Positive
from vdx.parallel import path_str
from vdx.types import Params

__all__ = ["OPTIMIZERS", "SCHEDULES", "Optimizer"]

# Biases, norms, tables, null values and embeddings are not pulled towards zero.
NO_DECAY = re.compile(r"(bias|scale|table|null|embedding)$")

# The parameters that Muon orthogonalises: the matrices of the scanned blocks [depth, in, out], and
# those of the U-Nets' blocks, where a convolution [h, w, in, out] counts as a matrix from all that
# it reads to `out`.
BLOCK_MATRIX = re.compile(r"network/layers/.*kernel$")
UNET_MATRIX = re.compile(r"network/(.*/)?(down_\d+|middle|up_\d+)_\w+/.*kernel$")

# Root mean square of an orthogonalised update, over the learning rate: that of AdamW's updates.
MUON_RMS = 0.2

# params -> a tree of bools, True where weights decay.
DecayMask = Callable[[Params], Params]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`config.optim`: a row of OPTIMIZERS, after clipping, with its learning rate.

    The rate warms up linearly, then follows its schedule to the end of the run.
    """

    name: Annotated[str, OneOf(lambda: OPTIMIZERS)] = "adamw"  # a row of OPTIMIZERS
    learning_rate: Fraction = 1e-4  # after warm-up
    schedule: Annotated[str, OneOf(lambda: SCHEDULES)] = "cosine"  # a row of SCHEDULES
    warmup_steps: Index = 100  # steps from rate 0 to `learning_rate`
    end_factor: Fraction = 0.0  # the last learning rate, as a factor of `learning_rate`
    b1: Decay = 0.9  # decay of the first moment
    b2: Decay = 0.99  # decay of the second moment
    eps: Positive = 1e-8  # added to the divisor of an update
    weight_decay: NonNegative = 0.01  # of matrices; see NO_DECAY
    max_grad_norm: NonNegative = 1.0  # global norm that gradients are clipped to; 0: off
    grad_accum_steps: Count = 1  # microbatches of a step

    def __post_init__(self) -> None:
        check_fields(self, "config.optim")

    def rate(self, steps: int) -> optax.Schedule:
        """Return the learning rate as a function of the step."""
        warmup = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup_steps, 1))
        rest = SCHEDULES[self.schedule](self, max(steps - self.warmup_steps, 1))
        return optax.join_schedules([warmup, rest], [self.warmup_steps])

    def make(self, steps: int) -> optax.GradientTransformation:
        """Return the whole update: clipping, then the optimizer."""
        clip = optax.identity()
        if self.max_grad_norm:
            clip = optax.clip_by_global_norm(self.max_grad_norm)
        return optax.chain(clip, OPTIMIZERS[self.name](self, self.rate(steps), _decay_mask))


def _constant(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Keep the learning rate."""
    return optax.constant_schedule(optimizer.learning_rate)


def _cosine(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Fall along half a cosine."""
    return optax.cosine_decay_schedule(optimizer.learning_rate, steps, optimizer.end_factor)


def _linear(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """Fall along a line."""
    rate = optimizer.learning_rate
    return optax.linear_schedule(rate, rate * optimizer.end_factor, steps)


# name -> (optimizer, steps after warm-up) -> schedule.
SCHEDULES: dict[str, Callable[[Optimizer, int], optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
}


def _decay_mask(params: Params) -> Params:
    """Return True for every parameter that decays."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NO_DECAY.search(path_str(path)) is None, params
    )


def _adamw(
    optimizer: Optimizer, rate: optax.Schedule, decay_mask: DecayMask
) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov & Hutter 2019)."""
    return optax.adamw(
        rate,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )


def _muon(
    optimizer: Optimizer, rate: optax.Schedule, decay_mask: DecayMask
) -> optax.GradientTransformation:
    """Build Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for the rest.

    Muon's updates have the size of AdamW's (Liu et al. 2025, "Muon is scalable"), so that one
    learning rate serves both. AdamW has Nesterov's momentum here.
    """
    return optax.contrib.muon(
        rate,
        consistent_rms=MUON_RMS,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        weight_decay_mask=decay_mask,
        adam_b1=optimizer.b1,
        adam_b2=optimizer.b2,
        muon_weight_dimension_numbers=_muon_dimensions,
    )


def _muon_dimensions(params: Params) -> Any:
    """Return every parameter's matrix dimensions; None for those that AdamW updates."""

    def dimensions(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name = path_str(path)
        last = leaf.ndim - 1
        if BLOCK_MATRIX.search(name):
            return optax.contrib.MuonDimensionNumbers(last - 1, last)
        if UNET_MATRIX.search(name):
            return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)
        return None

    return jax.tree_util.tree_map_with_path(dimensions, params)


# name -> (optimizer, learning rate, decay mask) -> update.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
}
