"""Pretrained weights onto the mesh, one parameter at a time.

Everything that is wrong with a file or a folder is reported from the headers, before an array is
read. The host never holds the model: it holds at most the shards of one parameter that belong to
its own devices.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from vdx.files import read_json_object
from vdx.interop.keymap import (
    DO_NOT_FIT,
    Row,
    Slot,
    WeightsError,
    assign,
    flat,
    listed,
    slot_finder,
    slot_shape,
    zero_paths,
)
from vdx.interop.pth import read_pth
from vdx.interop.safetensors import read_header
from vdx.interop.stored_array import StoredArray, read_finite
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import new_shapes
from vdx.models.transformer import Transformer
from vdx.parallel import param_shardings, path_str
from vdx.types import Params

READERS: dict[str, Callable[[Path], dict[str, StoredArray]]] = {
    ".safetensors": read_header,
    ".pth": read_pth,
    ".pt": read_pth,
    ".bin": read_pth,
    ".ckpt": read_pth,
}
# Parameters that stay float32 for every dtype: norms, modulation, the embedding of time (diffusers
# has them in `_keep_in_fp32_modules` of Wan). They are small.
FLOAT32 = re.compile(r"(bias|scale|table|null)$|^network/time/")
# Fields of mixers that decide which blocks of a clip attend to which. No array depends on them.
BLOCKWISE = ("block", "window", "sink")
# Fields of a transformer that must be those of the weights, although no array may depend on them.
NETWORK_FIELDS = (
    "channels",
    "patch",
    "activation",
    "rope_theta",
    "absolute",
    "sincos",
    "cross",
    "time_scale",
)


class Piece(NamedTuple):
    """An array of a file, and the slot that it fills."""

    key: str
    stored: StoredArray
    slot: Slot


# Files


def open_weights(path: str | Path) -> dict[str, StoredArray]:
    """Return the arrays of a file, or of a folder that holds one model, by key.

    The folder has one file, or the shards that its `.safetensors.index.json` names. Reads headers
    only. Raises WeightsError if there is no such file or folder, if it holds no model or several,
    if a shard is missing, or if a file is cut off; FileError for no regular file.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} is not there. Give a file of weights, or its folder.")
    if not path.is_dir():
        if path.suffix not in READERS:
            raise WeightsError(f"{path}: weights are read from {', '.join(READERS)}.")
        return READERS[path.suffix](path)

    # A folder with one model.
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return _open_shards(indices[0])
    if len(files) == 1 and not indices:
        return read_header(files[0])

    # A folder with several, or with none.
    names = [file.name for file in indices or files]
    found = f"several: {', '.join(names)}" if names else "no .safetensors file"
    message = f"{path} should hold one model and holds {found}."
    below = sorted({file.parent.name for file in path.glob("*/*.safetensors")})
    if below:
        message += f" Name one of its folders: {', '.join(below)}."
    raise WeightsError(message)


def _open_shards(index: Path) -> dict[str, StoredArray]:
    """Return the arrays that an index lists, each from the file that it names."""
    file_of = read_json_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(map(_is_file_name, file_of.values())):
        raise WeightsError(
            f"{index} has no weight_map that names files in its folder. Download it again."
        )

    names = sorted(set(file_of.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        head = (
            f"{index.parent} lacks {len(missing)} of the {len(names)} files that its index names. "
            "Download them:"
        )
        raise WeightsError(listed(head, missing))

    shards = {name: read_header(index.parent / name) for name in names}
    lost = [f"{key}: not in {name}" for key, name in file_of.items() if key not in shards[name]]
    if lost:
        raise WeightsError(listed(f"{index} does not agree with its files:", lost))
    return {key: shards[name][key] for key, name in file_of.items()}


def _is_file_name(name: Any) -> bool:
    """Return whether a value is the name of a file inside of its folder."""
    return isinstance(name, str) and bool(name.strip(".")) and not set(name) & set("/\\\0")


# Onto the mesh


def abstract_params(
    shapes: Params, mesh: Mesh, dtype: str = "float32", trained: str | None = None
) -> Params:
    """Return the abstract parameters that `load_params` fills.

    vdx.parallel shards them. dtype: of the kernels. The parameters of FLOAT32, and those whose
    path the regex `trained` finds, are float32.
    """

    def one(path: tuple[Any, ...], leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
        name = path_str(path)
        leaf_dtype = jnp.dtype(dtype)
        if FLOAT32.search(name) or (trained and re.search(trained, name)):
            leaf_dtype = jnp.dtype(jnp.float32)
        return jax.ShapeDtypeStruct(leaf.shape, leaf_dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, shapes, param_shardings(mesh, shapes))


def match_params(
    source: Mapping[str, StoredArray], abstract: Params, rows: Sequence[Row]
) -> dict[str, list[Piece]]:
    """Return the arrays that fill each of our parameters, by its path. Reads nothing.

    Raises WeightsError that lists every key and every shape that disagrees.
    """
    leaves = flat(abstract)
    pieces: dict[str, list[Piece]] = defaultdict(list)
    problems = []

    # Every key has its slot now; the shapes may still differ.
    for key, slot in assign(source, abstract, rows).items():
        stored = source[key]
        shape = converted_shape(slot.layout.ours, stored.shape)
        needed = slot_shape(slot, leaves[slot.path].shape)
        if shape != needed:
            problems.append(f"{key}: is {shape} for {slot.path} {needed}")
        pieces[slot.path].append(Piece(key, stored, slot))

    if problems:
        raise WeightsError(listed(DO_NOT_FIT, problems))
    return pieces


def converted_shape(
    convert: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]
) -> tuple[int, ...]:
    """Return the shape of convert(array of this shape), without the array's memory."""
    return convert(np.broadcast_to(np.uint8(0), shape)).shape


def load_params(
    source: Mapping[str, StoredArray],
    abstract: Params,
    rows: Sequence[Row],
    optional: str | None = None,
) -> Params:
    """Return our parameters from files.

    They have the shapes, dtypes and shardings of `abstract`. optional: a regex of paths; parameters
    that it finds and no file has are left out. Raises WeightsError as `match_params` does, before
    any array is read, and for arrays that hold NaN or infinity.
    """
    if optional:
        abstract = _without_missing(source, abstract, rows, optional)
    pieces = match_params(source, abstract, rows)

    params = {}
    for path, leaf in flat(abstract).items():
        # Waiting for each parameter frees its copy on the host before the next one is read.
        params[path] = _load(leaf, pieces.get(path, ())).block_until_ready()
    return unflatten_dict(params, sep="/")


def _without_missing(
    source: Mapping[str, StoredArray], abstract: Params, rows: Sequence[Row], optional: str
) -> Params:
    """Return the abstract parameters without the optional ones that no file has."""
    leaves = flat(abstract)
    find_slot = slot_finder(rows)
    slots = [find_slot(key) for key in source]
    filled = {slot.path for slot in slots if slot is not None}
    filled.update(zero_paths(leaves, rows))
    kept = {
        path: leaf
        for path, leaf in leaves.items()
        if path in filled or not re.search(optional, path)
    }
    return unflatten_dict(kept, sep="/")


def _load(leaf: jax.ShapeDtypeStruct, pieces: Sequence[Piece]) -> jax.Array:
    """Load one parameter.

    Every array of the file is read once. Every shard of this host is filled once, also when
    several devices hold it.
    """
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])

    def bounds(index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        """Return (start, stop) of a shard along each axis."""
        assert index is not None  # only devices outside the sharding have none
        return tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))

    # Empty shards, by the part of the parameter that they are.
    shards = {}
    for index in sharding.addressable_devices_indices_map(leaf.shape).values():
        ends = bounds(index)
        shards[ends] = np.zeros([stop - start for start, stop in ends], leaf.dtype)

    # Every array of the file into the shards that contain its slot.
    for key, stored, slot in pieces:
        value = slot.layout.ours(read_finite(key, stored))
        for ends, shard in shards.items():
            within = tuple(slice(start, stop) for start, stop in ends)
            if slot.index is None:
                shard[...] = value[within]
                continue
            first, last = ends[0]  # layers of the stack in this shard
            if first <= slot.index < last:
                shard[slot.index - first] = value[within[1:]]
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: shards[bounds(index)])


# A whole model


def load_model(
    model: Denoiser,
    theirs: Denoiser,
    source: Mapping[str, StoredArray],
    rows: Sequence[Row],
    path: str | Path,
    mesh: Mesh,
    dtype: str,
    trained: str | None,
) -> Params:
    """Return the parameters of `model` from the weights of `theirs`, on the mesh.

    dtype: of the kernels. trained: a regex of paths that stay float32; those of them that no file
    has are left out. The model may attend blockwise where theirs does not, or otherwise: see
    BLOCKWISE. Raises WeightsError for a model that is another network, also where no array shows
    it, and as `load_params` does.
    """
    # Facts that no array may show.
    differences = _network_differences(model, theirs)
    if differences:
        raise WeightsError(listed(f"The model is not that of {path}:", differences))

    # The arrays.
    shapes = new_shapes(model)
    abstract = abstract_params(shapes, mesh, dtype, trained)
    return load_params(source, abstract, rows, trained)


def _network_differences(model: Denoiser, theirs: Denoiser) -> list[str]:
    """List the fields of a model that are not those of the weights."""
    ours, wanted = (_network_fields(denoiser.backbone) for denoiser in (model, theirs))
    differences = [
        f"config.model.backbone: {name} = {ours[name]}, but the weights have {value}"
        for name, value in wanted.items()
        if ours[name] != value
    ]

    length, wanted_length = (
        denoiser.signals.get("embeddings", {}).get("length") for denoiser in (model, theirs)
    )
    if length != wanted_length:
        differences.append(
            f"config.model.signals.embeddings.length = {length}, not {wanted_length}"
        )
    return differences


def _network_fields(network: Transformer) -> dict[str, Any]:
    """Return the facts about a network that must be those of the weights."""
    width, depth, heads, pattern = network.dims()
    mixers = []
    for spec in pattern:
        fields = {name: value for name, value in spec.items() if name not in BLOCKWISE}
        # In messages a mixer without fields is its name.
        mixers.append(fields["name"] if len(fields) == 1 else fields)

    return {
        "width": width,
        "depth": depth,
        "heads": heads,
        "pattern": tuple(mixers),
        "hidden features": network.hidden(),
        **{name: getattr(network, name) for name in NETWORK_FIELDS},
    }
