"""The state of a run: one pytree that goes into a step and comes out."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vdx.models.denoiser import Denoiser
from vdx.parallel import opt_shardings, param_shardings, replicated
from vdx.types import Params


class TrainState(flax.struct.PyTreeNode):
    """step: int32 steps taken; params, opt_state and ema float32, sharded alike; key: the seed
    that every random draw of the run is folded from. accepted: int32 steps that were not refused
    for bad numbers; norm: running mean of their gradient norms."""

    step: Any
    params: Params
    opt_state: Any
    ema: Params
    key: Any
    norm: Any
    accepted: Any


def init_state(model: Denoiser, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state at step 0."""
    key = jax.random.key(seed)
    params = model.new_params(key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params),
                      ema=params, key=key, norm=jnp.zeros((), jnp.float32),
                      accepted=jnp.zeros((), jnp.int32))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where every leaf of a (possibly abstract) state lies."""
    params = param_shardings(mesh, state.params)
    one = replicated(mesh)
    return TrainState(step=one, params=params, ema=params, key=one, norm=one, accepted=one,
                      opt_state=opt_shardings(mesh, state.opt_state, params))
