"""Shapes of the parameters of networks, each traced once in a session.

Tracing an initialisation takes up to a second, and most tests only need its shapes.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

_TRACED: dict[Any, Any] = {}


def init_shapes(module: nn.Module, *inputs: Any) -> Any:
    """Return the shapes of the parameters that `module.init` makes for these inputs.

    Inputs without a shape, such as flags, are not traced.
    """
    leaves, structure = jax.tree.flatten(inputs)
    flags = [None if hasattr(leaf, "shape") else leaf for leaf in leaves]

    def init(key: Any, arrays: list[Any]) -> Any:
        given = [a if f is None else f for a, f in zip(arrays, flags, strict=True)]
        return module.init(key, *jax.tree.unflatten(structure, given))

    arrays = [leaf if hasattr(leaf, "shape") else 0 for leaf in leaves]
    kinds = [
        (a.shape, str(a.dtype)) if f is None else f for a, f in zip(leaves, flags, strict=True)
    ]
    return _once(
        (module, structure, *kinds),
        lambda: jax.eval_shape(init, jax.random.key(0), arrays)["params"],
    )


def new_shapes(model: Any) -> Any:
    """Return the shapes of the parameters of `model.new_params`."""
    return _once((model,), lambda: jax.eval_shape(model.new_params, jax.random.key(0)))


def _once(about: tuple[Any, ...], trace: Callable[[], Any]) -> Any:
    """Return the first result of `trace` for this description, in new containers."""
    module, *rest = about
    # A module with a dict in a field has no hash; its text has all its fields.
    key = (type(module), repr(module), *rest)
    if key not in _TRACED:
        _TRACED[key] = trace()
    return jax.tree.map(lambda leaf: leaf, _TRACED[key])
