"""The device mesh, and what is split over it.

Four axes, any of which may be 1:
  data     copies of the model, each with its share of the batch
  fsdp     shares of the batch *and* of every weight (gathered layer by layer)
  context  shares of the token grid of one clip
  tensor   shares of the heads and of the hidden features

Parameters are split by the first matching row of PARAM_RULES; activations by `constrain`.
Recipe: `jax.make_mesh` with Auto axes, `jax.set_mesh`, `jax.jit` with NamedSharding.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vdx.config.build import ConfigError
from vdx.types import Array, Batch

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")

# (regex over the parameter's path, mesh axes of its LAST dimensions). Dimensions further left,
# such as the layer axis of a scan, are not split. First match wins; no match is an error.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # From the few channels of pixels or latents.
    (r"(conv_in|quant_conv|hint/conv_\d+)/kernel$", ()),
    (r"depthwise\w*/kernel$", ()),  # a few numbers a feature
    (r"/(control_)?patch/kernel$", (None, "fsdp")),  # from few channels as well
    (r"/skip/kernel$", ()),
    (r"conv\w*/kernel$", ("fsdp", None)),  # before the rules below: "conv" ends in "v"
    (r"conv\w*/bias$", ()),
    (r"(q|k|v|up|decay)/kernel$", ("fsdp", "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    (r"(q|k|v|up|decay)/bias$", ("tensor",)),
    (r"(q|k|v|up|decay)/lora_a$", ("fsdp", None)),  # factors lie as the kernel they stand beside
    (r"(q|k|v|up|decay)/lora_b$", (None, "tensor")),
    (r"(out|down)/lora_a$", ("tensor", None)),
    (r"(out|down)/lora_b$", (None, "fsdp")),
    (r"lora_a$", ("fsdp", None)),
    (r"embedding$", (None, "fsdp")),
    (r"kernel$", ("fsdp", None)),
    (r"(bias|scale|table|null|lora_b)$", ()),
)


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Devices along each axis; one axis may be -1, "all that are left"."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def make(self, devices=None) -> Mesh:
        """The mesh over `devices` (default: all). Raises ConfigError if the sizes do not fit."""
        devices = jax.devices() if devices is None else devices
        return jax.make_mesh(
            self.shape(len(devices)), AXES, axis_types=(AxisType.Auto,) * 4, devices=devices
        )

    def shape(self, count: int) -> tuple[int, ...]:
        """Devices along each axis, of `count`. Raises ConfigError if the sizes do not fit."""
        sizes = [getattr(self, a) for a in AXES]
        fixed = math.prod(s for s in sizes if s != -1)
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ConfigError(f"mesh {self}: sizes are positive, and at most one is -1.")
        if count % fixed or (-1 not in sizes and fixed != count):
            raise ConfigError(
                f"mesh {self} needs {'a multiple of ' if -1 in sizes else ''}{fixed} "
                f"devices, and {count} are here. Set --config.mesh.<axis>, or "
                "--mesh of vdx.sample."
            )
        return tuple(count // fixed if s == -1 else s for s in sizes)


def constrain(x: Array, axes: str, context: str = "") -> Array:
    """Says how an activation lies on the mesh, by the letters of its axes.

    `axes` is as in einops, e.g. "b t h w d": b is split over data and fsdp, n (heads) and f
    (hidden features) over tensor, and the letter named by `context` over context. Without a
    mesh this is the identity. Raises ValueError if a size does not divide, because XLA would
    replicate such an array without a word.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    rule = {"b": BATCH, "n": ("tensor",), "f": ("tensor",), context: ("context",)}
    spec = [
        rule.get(letter) if size > 1 else None  # one entry is never split
        for letter, size in zip(axes.split(), x.shape, strict=True)
    ]
    for letter, size, names in zip(axes.split(), x.shape, spec, strict=True):
        parts = math.prod(mesh.shape[n] for n in names or ())
        if size % parts:
            raise ValueError(
                f"Axis {letter!r} of {axes!r} {x.shape} has {size} entries, which do "
                f"not divide over mesh axes {names} = {parts}."
            )
    return jax.lax.with_sharding_constraint(x, P(*spec))


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what the program is compiled for. Those are the mesh's devices, which
    may be only described, else the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def reshard_to_frames(y: Array, split: str) -> Array:
    """The end of a mixer whose tokens [b t h w d] were split by the letter `split`: as other
    layers have them, by t.

    Said in two steps, so that the cotangent of y lies as y does. XLA's partitioner (of jaxlib
    0.10.2) otherwise may contract tokens split by one letter with cotangents split by another,
    and half of the kernel's gradient is silently wrong.
    """
    return constrain(constrain(y, "b t h w d", context=split), "b t h w d", context="t")


def path_str(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def param_shardings(mesh: Mesh, params, rules=PARAM_RULES):
    """A NamedSharding for every parameter; `params` may be abstract (ShapeDtypeStruct).

    Raises ValueError that lists every parameter without a rule or with a size that does not
    divide, and every rule that names an axis the mesh lacks.
    """
    unknown = sorted({a for _, spec in rules for a in spec if a} - set(mesh.axis_names))
    if unknown:
        raise ValueError(f"Sharding rules name unknown mesh axes {unknown}; known: {AXES}.")
    problems: list[str] = []

    def one(path, leaf):
        name = path_str(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                full = (None,) * (leaf.ndim - len(spec)) + tuple(spec)
                for size, axis in zip(leaf.shape, full, strict=True):
                    if axis and size % mesh.shape[axis]:
                        problems.append(
                            f"{name} {leaf.shape}: {size} is not a multiple of "
                            f"mesh axis {axis} = {mesh.shape[axis]}"
                        )
                return NamedSharding(mesh, P(*full))
        problems.append(f"{name} {leaf.shape}: no sharding rule matches")

    out = jax.tree_util.tree_map_with_path(one, params)
    if problems:
        raise ValueError("Parameters that cannot be laid out:\n  " + "\n  ".join(problems))
    return out


def opt_shardings(mesh: Mesh, opt_state, params_shardings):
    """Optimizer moments lie where their parameters lie; counters are replicated.

    A moment is known by its path, which ends in that of its parameter.
    """
    known = {
        path_str(path): s for path, s in jax.tree_util.tree_flatten_with_path(params_shardings)[0]
    }

    def one(path, _):
        parts = path_str(path).split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((known[tail] for tail in tails if tail in known), replicated(mesh))

    return jax.tree_util.tree_map_with_path(one, opt_state)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(BATCH))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> Batch:
    """This process's share of a batch as global arrays; text such as keys stays on the host."""
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, v) for k, v in _numbers(batch).items()
    }


def like_batch(
    mesh: Mesh, example: Mapping[str, np.ndarray], local: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract: what `put_batch` makes of `local` such examples (without an axis b) a process."""
    return {
        k: jax.ShapeDtypeStruct(
            (local * jax.process_count(), *v.shape),
            jax.dtypes.canonicalize_dtype(v.dtype),
            sharding=batch_sharding(mesh),
        )
        for k, v in _numbers(example).items()
    }


def _numbers(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {k: np.asarray(v) for k, v in batch.items()}
    return {k: v for k, v in arrays.items() if v.dtype.kind in "biuf" or str(v.dtype) == "bfloat16"}
