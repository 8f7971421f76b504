"""Shapes of the parameters of networks, each traced once in a process.

Tracing an initialisation takes up to a second. Readers of weights, plans and tests need only its
shapes, again and again for the same network.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from vdx.types import Params

_TRACED: dict[tuple[Any, ...], Params] = {}


def init_shapes(module: nn.Module, *inputs: Any) -> Params:
    """Return the shapes of the parameters that `module.init` makes for these inputs.

    Inputs without a shape, such as flags, are not traced.
    """
    leaves, structure = jax.tree.flatten(inputs)
    flags = [None if hasattr(leaf, "shape") else leaf for leaf in leaves]
    arrays = [leaf if hasattr(leaf, "shape") else 0 for leaf in leaves]

    def init(arrays: list[Any]) -> Any:
        given = [a if f is None else f for a, f in zip(arrays, flags, strict=True)]
        # The key is made here: no operation can run on the chips of a plan.
        return module.init(jax.random.key(0), *jax.tree.unflatten(structure, given))

    kinds = [
        (a.shape, str(a.dtype)) if f is None else f for a, f in zip(leaves, flags, strict=True)
    ]
    return trace_once(
        module,
        (structure, *kinds),
        lambda: jax.eval_shape(init, arrays)["params"],
    )


def new_shapes(model: Any) -> Params:
    """Return the shapes of `new_params` of a Denoiser. Raises ConfigError as it does."""
    return trace_once(
        model, (), lambda: jax.eval_shape(lambda: model.new_params(jax.random.key(0)))
    )


def trace_once(module: nn.Module, inputs: tuple[Any, ...], trace: Callable[[], Params]) -> Params:
    """Return the first result of `trace` for a module and what else it depends on.

    The result is in new containers.
    """
    # A module with a dict in a field has no hash; its text has all its fields.
    key = (type(module), repr(module), *inputs)
    if key not in _TRACED:
        _TRACED[key] = trace()
    return jax.tree.map(lambda leaf: leaf, _TRACED[key])
