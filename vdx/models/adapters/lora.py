"""Low-rank adapters (Hu et al. 2021): kernels W act as W + scale A B.

Only A and B are learned. A kernel [*layers in out] has two factors, in a tree like that of the
parameters, in the place of the kernel:

    lora_a    A [*layers in r]
    lora_b    B [*layers r out]

In training they act next to the frozen kernel, y = x W + scale (x A) B. No array of the kernel's
size is made.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vdx.config.build import ConfigError, check_fields, nearest
from vdx.config.ranges import Count, Decay, Positive
from vdx.types import Array, Params, PRNGKeyArray

__all__ = [
    "A",
    "Adapted",
    "B",
    "Lora",
    "WeightDelta",
    "adapt",
    "add_deltas",
    "concat_factors",
    "dense_kernels",
    "merge_factors",
]

A = "lora_a"
B = "lora_b"
# The projections of attention and of the MLPs.
BLOCKS = r"network/layers/.*/(q|k|v|image_k|image_v|out|up|down)/kernel$"
_DROPOUT = 0x10A  # folded into the key of a step; its other draws split that key


class Adapted(flax.struct.PyTreeNode):
    """Parameters with factors for some of their kernels. Accepted wherever Params are."""

    base: Params
    factors: Params
    key: PRNGKeyArray | None = None  # of the dropout of A's input; None: no dropout
    scale: float = flax.struct.field(pytree_node=False, default=1.0)  # of every product A B
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)  # share that is zeroed

    def apply(
        self,
        module: nn.Module,
        *args: Any,
        method: str,
        mutable: Any = False,
        **collections: Any,
    ) -> Any:
        """Call `module.apply` with the factors added to every dense layer that has some."""
        rngs = {}
        if self.dropout and self.key is not None:
            rngs["lora"] = self.key
        variables = {"params": self.base, "lora": self.factors, **collections}
        with nn.intercept_methods(self._add_low_rank):
            return module.apply(variables, *args, method=method, rngs=rngs, mutable=mutable)

    def _add_low_rank(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Add scale (x A) B to the output of a dense layer (a flax interceptor)."""
        y = call(*args, **kwargs)
        layer = context.module
        if not _is_dense(context) or not layer.has_variable("lora", A):
            return y

        x = args[0].astype(y.dtype)
        a: Array = layer.get_variable("lora", A).astype(y.dtype)
        b: Array = layer.get_variable("lora", B).astype(y.dtype)
        if layer.has_rng("lora"):
            keep = jax.random.bernoulli(layer.make_rng("lora"), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return y + (self.scale * (x @ a)) @ b


def _is_dense(context: nn.module.InterceptorContext) -> bool:
    return isinstance(context.module, nn.Dense) and context.method_name == "__call__"


def dense_kernels(new_params: Callable[[PRNGKeyArray], Params]) -> dict[str, Any]:
    """Return path -> abstract kernel of every dense layer.

    These kernels may have factors. new_params: creates the network's parameters; it is traced, not
    run.
    """
    paths = set()

    def record(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        if _is_dense(context):
            paths.add("/".join((*context.module.path, "kernel")))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes = jax.eval_shape(new_params, jax.random.key(0))
    return {path: leaf for path, leaf in _flat(shapes).items() if path in paths}


@dataclasses.dataclass(frozen=True)
class Lora:
    """The `lora` section of a config.

    It selects the kernels that have factors, and sets how these are trained.
    """

    rank: Count = 16  # of the product A B
    alpha: Positive | None = None  # the product A B is scaled by alpha / rank; None: by 1
    # Regexes searched for in the paths of kernels, "network/layers/block_0/full/q/kernel".
    targets: tuple[str, ...] = (BLOCKS,)
    dropout: Decay = 0.0  # share of A's input that is zeroed in training

    def __post_init__(self) -> None:
        """Raise ConfigError for values out of range."""
        check_fields(self, "config.lora")
        if not self.targets:
            raise ConfigError("config.lora.targets is empty: name at least one kernel.")

    @property
    def scale(self) -> float:
        """The factor of every product A B."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def select_kernels(self, kernels: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `dense_kernels` that are targets.

        Raises ConfigError for a target that matches none of them.
        """
        selected: dict[str, Any] = {}
        for target in self.targets:
            hits = [path for path in kernels if re.search(target, path)]
            if not hits:
                raise ConfigError(
                    f"config.lora.targets: {target!r} is found in no kernel of a "
                    f"dense layer.{nearest(target, kernels)} They are:\n  " + "\n  ".join(kernels)
                )
            selected |= {path: kernels[path] for path in hits}
        return selected

    def new_factors(self, key: PRNGKeyArray, kernels: Mapping[str, Any]) -> Params:
        """Draw float32 factors of these kernels.

        A is uniform within 1 / sqrt(in), as peft draws it. B is zero, so that new factors change
        nothing.
        """
        factors: dict[str, Array] = {}
        for i, (path, kernel) in enumerate(sorted(kernels.items())):
            layer = path.removesuffix("/kernel")
            *layers, fan_in, fan_out = kernel.shape
            bound = fan_in**-0.5
            factors[f"{layer}/{A}"] = jax.random.uniform(
                jax.random.fold_in(key, i), (*layers, fan_in, self.rank), jnp.float32, -bound, bound
            )
            factors[f"{layer}/{B}"] = jnp.zeros((*layers, self.rank, fan_out), jnp.float32)
        return unflatten_dict(factors, sep="/")

    def combine(self, base: Params, factors: Params, key: PRNGKeyArray | None = None) -> Adapted:
        """Return the adapted network.

        key: of a training step; without it nothing is dropped.
        """
        dropout_key = None
        if key is not None and self.dropout:
            dropout_key = jax.random.fold_in(key, _DROPOUT)
        return Adapted(base, factors, dropout_key, self.scale, self.dropout)


@dataclasses.dataclass(frozen=True)
class WeightDelta:
    """A change to a network, one of several that act at once."""

    factors: Params
    # path -> whole difference of a parameter, as some public files have for norms and biases.
    deltas: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0  # strength of the factors and of the differences


def adapt(params: Params | Adapted, *changes: WeightDelta, merge: bool = False) -> Params | Adapted:
    """Apply several changes to a network at once.

    They are adapters, or merged into its kernels. Adapters cost two small products per kernel and
    keep the factors' precision. Merged changes cost nothing, and in bfloat16 round W + A B to 8
    bits. Whole differences are always added. Raises ValueError for a path that the network does not
    have.
    """
    weighted = [(change.factors, change.weight) for change in changes]
    if isinstance(params, Adapted):
        weighted = [(params.factors, params.scale), *weighted]
        params = params.base

    for change in changes:
        params = add_deltas(params, change.deltas, change.weight)
    factors = concat_factors(*weighted)
    if merge:
        return merge_factors(params, factors)
    return Adapted(params, factors)


def concat_factors(*weighted: tuple[Params, float]) -> Params:
    """Return factors that act as the weighted sum of several.

    Their ranks are concatenated.
    """
    found: dict[str, list[Array]] = {}
    for factors, weight in weighted:
        for path, value in _flat(factors).items():
            if path.endswith(B):  # in A too it would count twice
                value = weight * value
            found.setdefault(path, []).append(value)

    rank_axis = {A: -1, B: -2}
    joined = {
        path: jnp.concatenate(values, rank_axis[path.rpartition("/")[2]])
        for path, values in found.items()
    }
    return unflatten_dict(joined, sep="/")


def merge_factors(params: Params, factors: Params, scale: float = 1.0) -> Params:
    """Replace every kernel W with W + scale A B, summed in float32, in W's type."""
    halves = _flat(factors)
    layers = [path.removesuffix(A) for path in halves if path.endswith(A)]
    for layer in layers:  # one after another: a product is as large as its kernel
        a = halves[layer + A].astype(jnp.float32)
        b = halves[layer + B].astype(jnp.float32)
        product = jnp.matmul(a, b, precision="highest")
        params = add_deltas(params, {layer + "kernel": product}, scale)
    return params


def add_deltas(params: Params, deltas: Mapping[str, Any], weight: float = 1.0) -> Params:
    """Add `weight` times these differences, path -> array, to some of the parameters.

    Sums are computed in float32 and returned in the parameter's type. Raises ValueError for a
    path that the network does not have.
    """
    leaves = _flat(params)
    unknown = sorted(set(deltas) - set(leaves))
    if unknown:
        raise ValueError(f"This network has no {', '.join(unknown)}.")

    changed = dict(leaves)
    for path, delta in deltas.items():
        leaf = leaves[path]
        total = leaf.astype(jnp.float32) + weight * delta.astype(jnp.float32)
        changed[path] = total.astype(leaf.dtype)
    return unflatten_dict(changed, sep="/")


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")
