"""Optimizers: AdamW and Muon with schedule, clipping, a decay mask and gradient accumulation."""

import dataclasses
import re

import jax
import optax
import optax.contrib

from vdx.config.build import lookup
from vdx.parallel import path_str
from vdx.types import Params

SCHEDULES = {
    "constant": lambda o, steps: optax.constant_schedule(o.learning_rate),
    "cosine": lambda o, steps: optax.cosine_decay_schedule(o.learning_rate, steps, o.end_factor),
    "linear": lambda o, steps: optax.linear_schedule(
        o.learning_rate, o.learning_rate * o.end_factor, steps
    ),
}

# Biases, norms, tables, null values and embeddings are not pulled towards zero.
NO_DECAY = re.compile(r"(bias|scale|table|null|embedding)$")


# What Muon orthogonalises: the matrices of the scanned blocks [depth, in, out], and those of the
# U-Nets' blocks, where a convolution [h, w, in, out] counts as the matrix of all that it reads.
BLOCK_MATRIX = re.compile(r"network/layers/.*kernel$")
UNET_MATRIX = re.compile(r"network/(.*/)?(down_\d+|middle|up_\d+)_\w+/.*kernel$")


def _adamw(o: "Optimizer", rate: optax.Schedule, decays) -> optax.GradientTransformation:
    """Loshchilov & Hutter 2019."""
    return optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decays)


def _muon(o: "Optimizer", rate: optax.Schedule, decays) -> optax.GradientTransformation:
    """Jordan et al. 2024 for the matrices of the blocks, at the update size of AdamW (Liu et al.
    2025, "Muon is scalable"), so that one learning rate serves both; AdamW with Nesterov's
    momentum for the rest."""

    def axes(path, x):
        name, last = path_str(path), x.ndim - 1
        if BLOCK_MATRIX.search(name):
            return optax.contrib.MuonDimensionNumbers(last - 1, last)
        if UNET_MATRIX.search(name):
            return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)
        return None

    def matrices(params: Params):
        return jax.tree_util.tree_map_with_path(axes, params)

    return optax.contrib.muon(
        rate,
        consistent_rms=0.2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        weight_decay_mask=decays,
        adam_b1=o.b1,
        adam_b2=o.b2,
        muon_weight_dimension_numbers=matrices,
    )


METHODS = {"adamw": _adamw, "muon": _muon}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row of METHODS after clipping: linear warm-up over `warmup_steps` steps, then `schedule`."""

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 100
    end_factor: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # largest global norm of the gradient
    grad_accum_steps: int = 1  # microbatches per step

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step."""
        body = lookup(self.schedule, SCHEDULES, "config.optim.schedule")
        warm = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup_steps, 1))
        return optax.join_schedules(
            [warm, body(self, max(steps - self.warmup_steps, 1))], [self.warmup_steps]
        )

    def make(self, steps: int) -> optax.GradientTransformation:
        def decays(params: Params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: NO_DECAY.search(path_str(path)) is None, params
            )

        method = lookup(self.name, METHODS, "config.optim.name")
        return optax.chain(
            optax.clip_by_global_norm(self.max_grad_norm), method(self, self.rate(steps), decays)
        )
