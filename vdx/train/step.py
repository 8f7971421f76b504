"""One training step: losses, gradients, update. Pure, jitted once per clip shape."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vdx.train.objectives.denoising import Losses, Objective
from vdx.train.state import TrainState
from vdx.types import Array, Batch, Params, PRNGKeyArray

__all__ = [
    "NORM_MEMORY",
    "Metrics",
    "TermGradients",
    "accumulated_gradients",
    "is_healthy",
    "make_train_step",
    "select_state",
    "term_gradients",
    "train_step",
    "updated_state",
]

Metrics = dict[str, Array]

# Accepted steps that the running mean of the gradient norm spans. No norm counts as a spike
# before that many: the mean is not known yet.
NORM_MEMORY = 100


class TermGradients(NamedTuple):
    """The losses of a batch and the gradient of each weighted loss term."""

    losses: Losses
    gradients: dict[str, Params]  # name of a loss term -> a tree like the trained parameters


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    ema_decay: float,
    grad_accum_steps: int = 1,
    max_grad_norm_ratio: float = 0.0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Bind `train_step` to a run: step(state, batch, frozen=None) -> (state, metrics).

    The caller jits it, with shardings and donation of the state.
    """
    return functools.partial(
        train_step,
        objective=objective,
        tx=tx,
        ema_decay=ema_decay,
        grad_accum_steps=grad_accum_steps,
        max_grad_norm_ratio=max_grad_norm_ratio,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Params | None = None,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    ema_decay: float,
    grad_accum_steps: int,
    max_grad_norm_ratio: float,
) -> tuple[TrainState, Metrics]:
    """Take one step; a refused batch advances the step count and changes no other bit.

    `frozen` are the parameters that are not trained, if only a part is.
    """
    # Gradients
    key = jax.random.fold_in(state.key, state.step)
    losses, gradients = accumulated_gradients(
        objective, state.params, frozen, batch, key, grad_accum_steps
    )
    loss = objective.weighted_sum(losses.terms)
    gradient = _sum_trees(gradients)
    norm = optax.tree.norm(gradient)

    # The update, unless the numbers are bad
    updated = updated_state(state, gradient, norm, tx, ema_decay)
    ok = is_healthy(state, loss, norm, max_grad_norm_ratio)
    new = select_state(ok, updated, state)

    # Metrics, which stay on the devices until the next step has been dispatched
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "ok": ok,
        "accepted": new.accepted,
        "bin_sums": losses.bin_sums,
        "bin_counts": losses.bin_counts,
    }
    if len(gradients) > 1:
        metrics |= term_metrics(losses, gradients)
    return new.replace(step=state.step + 1), metrics


def term_gradients(
    objective: Objective,
    params: Params,
    frozen: Params | None,
    batch: Batch,
    key: PRNGKeyArray,
) -> TermGradients:
    """Return a batch's losses and every term's gradient: one backward pass a term."""

    def losses_of(trained: Params) -> tuple[dict[str, Array], Losses]:
        network = objective.network_params(trained, frozen, key)
        losses = objective.losses(network, batch, key)
        return losses.terms, losses

    # One forward pass, then one backward pass a term
    terms, pullback, losses = jax.vjp(losses_of, params, has_aux=True)
    gradients = {}
    for name, term in objective.loss_terms.items():
        # The weight of this term, and 0 for every other one.
        cotangent = {other: jnp.zeros_like(value) for other, value in terms.items()}
        cotangent[name] = jnp.full_like(terms[name], term.weight)
        (gradients[name],) = pullback(cotangent)
    return TermGradients(losses, gradients)


def accumulated_gradients(
    objective: Objective,
    params: Params,
    frozen: Params | None,
    batch: Batch,
    key: PRNGKeyArray,
    grad_accum_steps: int,
) -> TermGradients:
    """Cut a batch into microbatches and average their losses and gradients.

    Sums and counts by noise level are added up, as over one batch.
    """
    if grad_accum_steps == 1:
        return term_gradients(objective, params, frozen, batch, key)

    micro = {name: _microbatches(array, grad_accum_steps) for name, array in batch.items()}
    compute = functools.partial(term_gradients, objective, params, frozen)

    # Gradients of one microbatch at a time, added up
    def add(total: TermGradients, inputs: tuple[Batch, Array]) -> tuple[TermGradients, None]:
        one, index = inputs
        new = compute(one, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, new), None

    first = jax.tree.map(lambda array: array[0], micro)
    shapes = jax.eval_shape(compute, first, key)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (losses, gradients), _ = jax.lax.scan(add, zeros, (micro, jnp.arange(grad_accum_steps)))

    # Sums -> means
    mean = functools.partial(jax.tree.map, lambda total: total / grad_accum_steps)
    return TermGradients(losses._replace(terms=mean(losses.terms)), mean(gradients))


def updated_state(
    state: TrainState,
    gradient: Params,
    norm: Array,
    tx: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    """Apply a gradient to parameters, their average, optimizer state and mean norm."""
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    # The average follows quickly at first: early samples should not show initial weights.
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = optax.incremental_update(params, state.ema, 1.0 - decay)

    accepted = state.accepted + 1
    mean_norm = state.norm + (norm - state.norm) / jnp.minimum(accepted, NORM_MEMORY)
    return state.replace(
        params=params, opt_state=opt_state, ema=ema, accepted=accepted, norm=mean_norm
    )


def is_healthy(state: TrainState, loss: Array, norm: Array, max_grad_norm_ratio: float) -> Array:
    """Return whether loss and gradient norm are finite and the norm is no spike.

    A spike exceeds `max_grad_norm_ratio` times the running mean of the norms; with 0 any
    finite norm passes.
    """
    ok = jnp.isfinite(loss) & jnp.isfinite(norm)
    if max_grad_norm_ratio:
        is_warming_up = state.accepted < NORM_MEMORY
        ok &= is_warming_up | (norm <= max_grad_norm_ratio * state.norm)
    return ok


def select_state(ok: Array, updated: TrainState, state: TrainState) -> TrainState:
    """Return the updated state where `ok`, else the old one, bit for bit."""

    def select(new: Array, old: Array) -> Array:
        return new if new is old else jnp.where(ok, new, old)

    return jax.tree.map(select, updated, state)


def term_metrics(losses: Losses, gradients: dict[str, Params]) -> Metrics:
    """Return each term's loss and its share of the gradient.

    The share is that of the summed norms of the terms' gradients.
    """
    norms = {name: optax.tree.norm(gradient) for name, gradient in gradients.items()}
    total = functools.reduce(jnp.add, norms.values())
    values = {f"loss_{name}": value for name, value in losses.terms.items()}
    shares = {f"gradient_share_{name}": norm / total for name, norm in norms.items()}
    return values | shares


def _microbatches(array: Array, count: int) -> Array:
    """Split [b ...] into [count, b / count, ...], strided.

    Strided, so that a microbatch takes rows from every device's share.
    """
    return jnp.swapaxes(array.reshape(-1, count, *array.shape[1:]), 0, 1)


def _sum_trees(trees: dict[str, Params]) -> Params:
    """Add up trees of one structure; a single tree is returned as it is."""
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), trees.values())
