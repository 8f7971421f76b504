"""Floating-point operations of matrix products and convolutions, counted in a traced function.

Nothing is compiled: loops of known length count as often as they run, and each operation once,
whatever the number of devices. Networks state what they cost by a formula where they can; this
counts the rest, and checks them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def traced(function: Callable, *args: Any) -> float:
    """Operations of function(*args), two to a multiply-add; the arguments may be shapes.

    The longer branch of a condition counts, and one pass of a loop that ends by itself; what a
    kernel costs is as it says itself (`pl.CostEstimate`), or nothing.
    """
    return counted(jax.make_jaxpr(function)(*args).jaxpr)


def counted(jaxpr: Any) -> float:
    """Those of a jaxpr."""
    return float(sum(_cost(eqn) for eqn in jaxpr.eqns))


def _cost(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return 2.0 * eqn.outvars[0].aval.size * depth
    if name == "conv_general_dilated":
        kernel, spec = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec
        read = kernel.size / kernel.shape[spec[0]]
        # Between the entries of a dilated input there are zeros.
        return 2.0 * eqn.outvars[0].aval.size * read / math.prod(params["lhs_dilation"])
    if name == "pallas_call":
        return float(getattr(params.get("cost_estimate"), "flops", 0))
    inner = [
        counted(getattr(value, "jaxpr", value))
        for value in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
        if _is_jaxpr(value)
    ]
    if name == "cond":
        return max(inner)
    times = {"scan": lambda: params["length"], "shard_map": lambda: params["mesh"].size}
    return sum(inner) * times.get(name, lambda: 1)()


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
