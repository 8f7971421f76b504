"""The state of a run: one pytree that goes into a step and comes out."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vdx.parallel import PARAM_RULES, Rules, opt_shardings, param_shardings, replicated
from vdx.seeds import seed_key
from vdx.types import Array, Params, PRNGKeyArray


class TrainState(flax.struct.PyTreeNode):
    """The arrays that a step reads and changes.

    Parameters, their average and their moments have the same shardings.
    """

    step: Array  # int32, steps taken, refused ones included
    params: Params  # float32, what is trained: the network's parameters, some, or adapters
    opt_state: optax.OptState  # float32 moments
    ema: Params  # float32, the averaged `params`
    key: PRNGKeyArray  # every random draw of the run is folded from it
    norm: Array  # float32, running mean of the accepted steps' gradient norms
    accepted: Array  # int32, steps that were not refused for bad numbers


def init_state(params: Params, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Return the state at step 0 with these parameters."""
    # The average is a copy: jit would otherwise give both the same buffer.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params),
        key=seed_key(seed),
        norm=jnp.zeros((), jnp.float32),
        accepted=jnp.zeros((), jnp.int32),
    )


def state_shardings(mesh: Mesh, state: TrainState, rules: Rules = PARAM_RULES) -> TrainState:
    """Return the sharding of every leaf of a (possibly abstract) state."""
    params = param_shardings(mesh, state.params, rules)
    one = replicated(mesh)
    return state.replace(
        step=one,
        params=params,
        ema=params,
        key=one,
        norm=one,
        accepted=one,
        opt_state=opt_shardings(mesh, state.opt_state, params),
    )


def with_shardings(abstract: TrainState, shardings: TrainState) -> TrainState:
    """Return an abstract state whose leaves carry their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
