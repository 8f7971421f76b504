"""Operations of products and convolutions, counted in a traced function.

Operations are those of floating-point numbers, products those of matrices. Nothing is compiled. A
loop of known length counts as often as it runs, and each operation once, whatever the number of
devices. Networks have a formula for their cost where they can; this module counts the rest, and
the tests check the formulas against it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def traced(function: Callable[..., Any], *args: Any) -> float:
    """Count the operations of function(*args), two to a multiply-add.

    The arguments may be shapes. The costlier branch of a condition counts, and one pass of a
    `while` loop. A kernel costs what it declares (`pl.CostEstimate`), or nothing.
    """
    return counted(jax.make_jaxpr(function)(*args).jaxpr)


def counted(jaxpr: Any) -> float:
    """Count the operations of a jaxpr."""
    return float(sum(_cost(eqn) for eqn in jaxpr.eqns))


def _cost(eqn: Any) -> float:
    """Return the operations of one equation, those of its inner jaxprs included."""
    name = eqn.primitive.name
    params = eqn.params
    if name == "dot_general":
        return _dot_cost(eqn)
    if name == "conv_general_dilated":
        return _convolution_cost(eqn)
    if name == "pallas_call":
        return float(getattr(params.get("cost_estimate"), "flops", 0))

    leaves = jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
    inner = [counted(getattr(leaf, "jaxpr", leaf)) for leaf in leaves if _is_jaxpr(leaf)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return sum(inner) * params["length"]
    if name == "shard_map":  # its jaxpr is that of one device
        return sum(inner) * params["mesh"].size
    return sum(inner)


def _dot_cost(eqn: Any) -> float:
    """Return two operations for every output and every entry of the contracted axes."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2.0 * eqn.outvars[0].aval.size * depth


def _convolution_cost(eqn: Any) -> float:
    """Return two operations for every output and every kernel entry that it reads.

    Padding counts as if it were pixels. Between the entries of a dilated input there are zeros,
    which do not count.
    """
    kernel = eqn.invars[1].aval
    output_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    read = kernel.size / kernel.shape[output_axis]
    return 2.0 * eqn.outvars[0].aval.size * read / math.prod(eqn.params["lhs_dilation"])


def _is_jaxpr(value: Any) -> bool:
    """Return whether a parameter of an equation is a jaxpr, open or closed."""
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
