"""Optimizers: AdamW with schedule, clipping, a decay mask and gradient accumulation."""

import dataclasses
import re

import jax
import optax

from vdx.build import lookup
from vdx.parallel import path_str
from vdx.types import Params

SCHEDULES = {
    "constant": lambda o, steps: optax.constant_schedule(o.learning_rate),
    "cosine": lambda o, steps: optax.cosine_decay_schedule(o.learning_rate, steps, o.end_factor),
    "linear": lambda o, steps: optax.linear_schedule(
        o.learning_rate, o.learning_rate * o.end_factor, steps),
}

# Biases, norms, tables, null values and embeddings are not pulled towards zero.
NO_DECAY = re.compile(r"(bias|scale|table|null|embedding)$")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019): linear warm-up over `warmup` steps, then `schedule`."""

    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 100
    end_factor: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0            # largest global norm of the gradient
    accumulate: int = 1          # microbatches per step

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate as a function of the step."""
        body = lookup(self.schedule, SCHEDULES, "config.optim.schedule")
        warm = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup, 1))
        return optax.join_schedules([warm, body(self, max(steps - self.warmup, 1))], [self.warmup])

    def make(self, steps: int) -> optax.GradientTransformation:
        def decays(params: Params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: NO_DECAY.search(path_str(path)) is None, params)

        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.rate(steps), b1=self.b1, b2=self.b2, eps=self.eps,
                        weight_decay=self.weight_decay, mask=decays))
