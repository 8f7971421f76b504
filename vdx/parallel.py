"""The device mesh, and the sharding of arrays over it.

The mesh has four axes, any of which may be 1:
  data     copies of the model, each with its share of the batch
  fsdp     shares of the batch *and* of every weight (gathered layer by layer)
  context  shares of the token grid of one clip
  tensor   shares of the heads and of the hidden features

Parameters are sharded by the first matching row of PARAM_RULES; activations by `constrain`.
Recipe: `jax.make_mesh` with Auto axes, `jax.set_mesh`, `jax.jit` with NamedSharding.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vdx.config.build import ConfigError, check_fields
from vdx.config.ranges import Count
from vdx.types import Array, Batch, Float

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the batch

Size = Literal[-1] | Count  # devices along an axis of the mesh; -1: those that are left
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]

# (regex over the parameter's path, mesh axes of its LAST dimensions). Dimensions further left,
# such as the layer axis of a scan, are not split. First match wins; no match is an error.
PARAM_RULES: Rules = (
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
    (r"(q|k|v|up|decay)/lora_a$", ("fsdp", None)),  # factors are split like their kernel
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
    """Devices along each axis; one axis may be -1, the devices that are left."""

    data: Size = -1  # splits the batch; weights are copied
    fsdp: Size = 1  # splits the batch and the weights
    context: Size = 1  # splits the tokens of a clip
    tensor: Size = 1  # splits heads and hidden features

    def __post_init__(self) -> None:
        check_fields(self, "config.mesh")

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """Return the mesh over `devices` (default: all).

        Raises:
            ConfigError: the sizes do not fit the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        shape = self.shape(len(devices))
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)

    def shape(self, count: int) -> tuple[int, ...]:
        """Return the devices along each axis, of `count` devices.

        Raises:
            ConfigError: the sizes do not fit this number.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        fixed = math.prod(size for size in sizes if size != -1)
        is_open = -1 in sizes
        if sizes.count(-1) > 1:
            raise ConfigError(f"mesh {self}: at most one size is -1.")
        if count % fixed or (not is_open and fixed != count):
            raise ConfigError(
                f"mesh {self} needs {'a multiple of ' if is_open else ''}{fixed} "
                f"devices, and {count} are here. Set --config.mesh.<axis>, or "
                "--mesh of vdx.sample."
            )
        return tuple(count // fixed if size == -1 else size for size in sizes)


def constrain(x: Array, axes: str, context: str = "") -> Array:
    """Constrain the sharding of an activation, by the letters of its axes.

    Without a mesh this is the identity.

    Args:
        x: the activation.
        axes: its axes as in einops, e.g. "b t h w d". b is split over data and fsdp, n (heads) and
            f (hidden features) over tensor.
        context: the letter that is split over context.

    Raises:
        ValueError: a size does not divide. XLA would silently replicate such an array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    # The mesh axes of each axis of x.
    letters = axes.split()
    mesh_axes = {"b": BATCH, "n": ("tensor",), "f": ("tensor",), context: ("context",)}
    spec = [
        mesh_axes.get(letter) if size > 1 else None  # one entry is never split
        for letter, size in zip(letters, x.shape, strict=True)
    ]

    for letter, size, names in zip(letters, x.shape, spec, strict=True):
        parts = math.prod(mesh.shape[name] for name in names or ())
        if size % parts:
            raise ValueError(
                f"Axis {letter!r} of {axes!r} {x.shape} has {size} entries, which do "
                f"not divide over mesh axes {names} = {parts}."
            )
    return jax.lax.with_sharding_constraint(x, P(*spec))


def reshard_to_frames(y: Float[Array, "b t h w d"], split: str) -> Float[Array, "b t h w d"]:
    """Reshard the result of a mixer, split by the letter `split`, to be split by t.

    It takes two constraints, so that the cotangent of y is sharded like y. XLA's partitioner (of
    jaxlib 0.10.2) may otherwise contract tokens split by one letter with cotangents split by
    another, and half of the kernel's gradient is silently wrong.
    """
    y = constrain(y, "b t h w d", context=split)
    return constrain(y, "b t h w d", context="t")


def platform() -> str:
    """Return "cpu", "gpu" or "tpu", the platform that the program is compiled for.

    It is that of the mesh's devices, which may be only described, or else of the default ones.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def path_str(path: Sequence[Any]) -> str:
    """Return the path of a leaf as names joined by "/"."""
    return "/".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    """Return the name in a key of a path: of a dict, an attribute or a sequence."""
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def param_shardings(mesh: Mesh, params: Any, rules: Rules = PARAM_RULES) -> Any:
    """Return a NamedSharding for every parameter.

    `params` may be abstract (ShapeDtypeStruct).

    Raises:
        ValueError: a parameter has no rule or a size that does not divide, or a rule names an axis
            that the mesh lacks. The message lists all of them.
    """
    unknown = sorted({axis for _, spec in rules for axis in spec if axis} - set(mesh.axis_names))
    if unknown:
        raise ValueError(f"Sharding rules name unknown mesh axes {unknown}; known: {AXES}.")

    problems: list[str] = []

    def shard(path: Sequence[Any], leaf: Any) -> NamedSharding | None:
        # The first rule that matches.
        name = path_str(path)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            problems.append(f"{name} {leaf.shape}: no sharding rule matches")
            return None

        # Rules are of the last dimensions.
        full = (None,) * (leaf.ndim - len(spec)) + tuple(spec)
        for size, axis in zip(leaf.shape, full, strict=True):
            if axis and size % mesh.shape[axis]:
                problems.append(
                    f"{name} {leaf.shape}: {size} is not a multiple of "
                    f"mesh axis {axis} = {mesh.shape[axis]}"
                )
        return NamedSharding(mesh, P(*full))

    shardings = jax.tree_util.tree_map_with_path(shard, params)
    if problems:
        raise ValueError("Parameters that cannot be sharded:\n  " + "\n  ".join(problems))
    return shardings


def opt_shardings(mesh: Mesh, opt_state: Any, params_shardings: Any) -> Any:
    """Return shardings of the optimizer state.

    Moments are sharded like their parameters, the rest is replicated. The path of a moment ends in
    the path of its parameter.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params_shardings)[0]
    sharding_of = {path_str(path): sharding for path, sharding in leaves}

    def shard(path: Sequence[Any], _: Any) -> NamedSharding:
        names = path_str(path).split("/")
        for i in range(len(names)):
            tail = "/".join(names[i:])
            if tail in sharding_of:
                return sharding_of[tail]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(shard, opt_state)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, P(BATCH))


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> Batch:
    """Put this process's share of a batch on the devices, as global arrays.

    Text such as keys stays on the host.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in _numeric_arrays(batch).items()
    }


def abstract_batch(
    mesh: Mesh, example: Mapping[str, np.ndarray], local: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of `put_batch`, for `local` examples a process.

    The example has no axis b.
    """
    return {
        name: jax.ShapeDtypeStruct(
            (local * jax.process_count(), *array.shape),
            jax.dtypes.canonicalize_dtype(array.dtype),
            sharding=batch_sharding(mesh),
        )
        for name, array in _numeric_arrays(example).items()
    }


def _numeric_arrays(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the entries of a batch that are numbers or booleans."""
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {
        name: array
        for name, array in arrays.items()
        if array.dtype.kind in "biuf" or str(array.dtype) == "bfloat16"
    }
