"""The state of a run: one pytree that goes into a step and comes out."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vdx.parallel import opt_shardings, param_shardings, replicated
from vdx.types import Params


class TrainState(flax.struct.PyTreeNode):
    """step: int32 steps taken; params (what is trained: the network's, or adapters beside frozen
    ones), opt_state and ema float32, sharded alike; key: the seed that every random draw of the
    run is folded from. accepted: int32 steps that were not refused for bad numbers; norm: running
    mean of their gradient norms."""

    step: Any
    params: Params
    opt_state: Any
    ema: Params
    key: Any
    norm: Any
    accepted: Any


def init_state(params: Params, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """The state at step 0."""
    # A copy, or params that are given to jit would be one buffer with their average.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params),
        key=jax.random.key(seed),
        norm=jnp.zeros((), jnp.float32),
        accepted=jnp.zeros((), jnp.int32),
    )


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where every leaf of a (possibly abstract) state lies."""
    params = param_shardings(mesh, state.params)
    one = replicated(mesh)
    return TrainState(
        step=one,
        params=params,
        ema=params,
        key=one,
        norm=one,
        accepted=one,
        opt_state=opt_shardings(mesh, state.opt_state, params),
    )
