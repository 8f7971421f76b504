"""Low-rank adapters (Hu et al. 2021): a kernel W acts as W + scale A B, and A, B alone are learned.

The factors of a kernel [*layers in out] are `lora_a` [*layers in r] and `lora_b` [*layers r out],
in a tree like that of the parameters, in the place of the kernel. In training they act beside the
frozen kernel, y = x W + scale (x A) B, so that no array of the kernel's size is made.
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

from vdx.config.build import ConfigError, nearest
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
    "merged",
]

A, B = "lora_a", "lora_b"
BLOCKS = r"network/layers/.*/(q|k|v|image_k|image_v|out|up|down)/kernel$"
_DROPOUT = 0x10A  # folded into the key of a step; its other draws split that key


class Adapted(flax.struct.PyTreeNode):
    """Parameters with factors beside some of their kernels. What takes Params takes this.

    scale: of every product A B. key: of the dropout of what A reads, None: nothing is dropped.
    """

    base: Params
    factors: Params
    key: PRNGKeyArray | None = None
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    def apply(
        self, module: nn.Module, *args, method: str, mutable: Any = False, **collections
    ) -> Any:
        """`module.apply`, with the factors beside the kernels."""
        rngs = {"lora": self.key} if self.dropout and self.key is not None else {}
        with nn.intercept_methods(self._beside):
            return module.apply(
                {"params": self.base, "lora": self.factors, **collections},
                *args,
                method=method,
                rngs=rngs,
                mutable=mutable,
            )

    def _beside(self, call: Callable, args, kwargs, context) -> Any:
        y, layer = call(*args, **kwargs), context.module
        if not _is_dense(context) or not layer.has_variable("lora", A):
            return y
        x, a, b = (
            v.astype(y.dtype)
            for v in (args[0], layer.get_variable("lora", A), layer.get_variable("lora", B))
        )
        if layer.has_rng("lora"):
            keep = jax.random.bernoulli(layer.make_rng("lora"), 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return y + (self.scale * (x @ a)) @ b


def _is_dense(context: nn.module.InterceptorContext) -> bool:
    return isinstance(context.module, nn.Dense) and context.method_name == "__call__"


def dense_kernels(new_params: Callable[[PRNGKeyArray], Params]) -> dict[str, Any]:
    """path -> abstract kernel of every dense layer of a network: what may have factors."""
    found = set()

    def note(call, args, kwargs, context):
        if _is_dense(context):
            found.add("/".join((*context.module.path, "kernel")))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(new_params, jax.random.key(0))
    return {path: leaf for path, leaf in _flat(shapes).items() if path in found}


@dataclasses.dataclass(frozen=True)
class Lora:
    """The `lora` section of a config: which kernels have factors, and how these are trained.

    alpha: the factors' product is scaled by alpha / rank; None: by 1. targets: regexes that are
    searched for in the paths of kernels, such as "network/layers/block_0/full/q/kernel"; by
    default the projections of attention and of the MLPs. dropout: share of what A reads that is
    zeroed in training.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = (BLOCKS,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1 or not self.targets:
            raise ConfigError(
                f"config.lora: rank = {self.rank} must be at least 1, dropout = "
                f"{self.dropout} in [0, 1), and targets name at least one kernel."
            )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def chosen(self, kernels: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `dense_kernels` that are targets. Raises ConfigError for a target that is
        none of them."""
        out: dict[str, Any] = {}
        for target in self.targets:
            hits = [path for path in kernels if re.search(target, path)]
            if not hits:
                raise ConfigError(
                    f"config.lora.targets: {target!r} is found in no kernel of a "
                    f"dense layer.{nearest(target, kernels)} They are:\n  " + "\n  ".join(kernels)
                )
            out |= {path: kernels[path] for path in hits}
        return out

    def new_factors(self, key: PRNGKeyArray, kernels: Mapping[str, Any]) -> Params:
        """float32 factors of these kernels: A uniform within 1 / sqrt(in), as peft draws it, and
        B zero, so that at first nothing is changed."""
        out: dict[str, Array] = {}
        for i, (path, kernel) in enumerate(sorted(kernels.items())):
            (*layers, fan_in, fan_out), layer = kernel.shape, path.removesuffix("/kernel")
            bound = fan_in**-0.5
            out[f"{layer}/{A}"] = jax.random.uniform(
                jax.random.fold_in(key, i), (*layers, fan_in, self.rank), jnp.float32, -bound, bound
            )
            out[f"{layer}/{B}"] = jnp.zeros((*layers, self.rank, fan_out), jnp.float32)
        return unflatten_dict(out, sep="/")

    def combine(self, base: Params, factors: Params, key: PRNGKeyArray | None = None) -> Adapted:
        """key: of a training step; without it nothing is dropped."""
        key = None if key is None or not self.dropout else jax.random.fold_in(key, _DROPOUT)
        return Adapted(base, factors, key, self.scale, self.dropout)


@dataclasses.dataclass(frozen=True)
class WeightDelta:
    """One of several changes to a network: factors, whole differences of other parameters by
    their paths (of norms and biases, as some public files have them), and its strength."""

    factors: Params
    deltas: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0


def adapt(params: Params | Adapted, *changes: WeightDelta, merge: bool = False) -> Params | Adapted:
    """A network with several changes at once, beside its kernels or merged into them.

    Beside costs two small products a kernel and keeps the factors' precision; merged costs
    nothing, and in bfloat16 rounds W + A B to 8 bits. Differences are always added. Raises
    ValueError for a path that the network does not have.
    """
    parts = [(change.factors, change.weight) for change in changes]
    if isinstance(params, Adapted):
        parts = [(params.factors, params.scale), *parts]
        params = params.base
    for change in changes:
        params = add_deltas(params, change.deltas, change.weight)
    factors = concat_factors(*parts)
    return merged(params, factors) if merge else Adapted(params, factors)


def concat_factors(*parts: tuple[Params, float]) -> Params:
    """One set of factors that acts as the weighted sum of several: their ranks in a row."""
    halves: dict[str, list[Array]] = {}
    for factors, weight in parts:
        for path, value in _flat(factors).items():
            halves.setdefault(path, []).append(weight * value if path.endswith(B) else value)
    return unflatten_dict(
        {
            path: jnp.concatenate(found, -1 if path.endswith(A) else -2)
            for path, found in halves.items()
        },
        sep="/",
    )


def merged(params: Params, factors: Params, scale: float = 1.0) -> Params:
    """W + scale A B in the place of every kernel W, summed in float32, in W's type."""
    halves = _flat(factors)
    for path in halves:
        if path.endswith(A):  # one after another: a product is as large as its kernel
            a, b = (halves[path.removesuffix(A) + h].astype(jnp.float32) for h in (A, B))
            params = add_deltas(
                params,
                {path.removesuffix(A) + "kernel": jnp.matmul(a, b, precision="highest")},
                scale,
            )
    return params


def add_deltas(params: Params, deltas: Mapping[str, Any], weight: float = 1.0) -> Params:
    """Parameters with `weight` times these differences, path -> array, added to some of them."""
    leaves = _flat(params)
    if unknown := sorted(set(deltas) - set(leaves)):
        raise ValueError(f"This network has no {', '.join(unknown)}.")
    new = {
        path: (leaves[path].astype(jnp.float32) + weight * delta.astype(jnp.float32)).astype(
            leaves[path].dtype
        )
        for path, delta in deltas.items()
    }
    return unflatten_dict({**leaves, **new}, sep="/")


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")
