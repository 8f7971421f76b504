"""Public weights onto the mesh and back into files, one parameter at a time.

What is wrong with a file or a folder is said from the headers, before an array is read. The host
never holds the model: at most the shares of one parameter that lie on its own devices.
"""

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, SingleDeviceSharding

from vdx.files import read_json
from vdx.interop.keymap import (
    Place,
    Row,
    WeightsError,
    absent,
    assign,
    flat,
    listed,
    place_of,
)
from vdx.interop.pth import read_pth
from vdx.interop.safetensors import read_header
from vdx.interop.stored_array import StoredArray
from vdx.models.denoiser import Denoiser
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
# Kept in float32 whatever is asked for: norms, modulation, the embedding of time (as diffusers'
# `_keep_in_fp32_modules` of Wan). They are small.
FLOAT32 = re.compile(r"(bias|scale|table|null)$|^network/time/")
BLOCKWISE = ("block", "window", "sink")  # fields of mixers


def open_weights(path: str | Path) -> dict[str, StoredArray]:
    """key -> where the array lies, of one file, or of a folder that holds one model in one file
    or in the parts that its `.safetensors.index.json` names. Reads headers only.

    Raises WeightsError if there is no such file or folder, if it holds no or several models, if
    a part is missing, or if a file is cut off.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in READERS:
            raise WeightsError(f"{path}: weights are read from {', '.join(READERS)}.")
        return READERS[path.suffix](path)
    if not path.is_dir():
        raise WeightsError(f"{path} is not there.")
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return _parts(indices[0])
    if len(files) == 1 and not indices:
        return read_header(files[0])
    found = [p.name for p in indices or files]
    below = sorted({p.parent.name for p in path.glob("*/*.safetensors")})
    raise WeightsError(
        f"{path} should hold one model and holds "
        f"{'several: ' + ', '.join(found) if found else 'no .safetensors file'}."
        + (f" Name one of its folders: {', '.join(below)}." if below else "")
    )


def _parts(index: Path) -> dict[str, StoredArray]:
    """The arrays that an index names, each from the part that it says."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise WeightsError(f"{index} has no weight_map.")
    names = sorted(set(where.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WeightsError(
            listed(
                f"{index.parent} lacks {len(missing)} of the {len(names)} files "
                "that its index names. Download them:",
                missing,
            )
        )
    parts = {name: read_header(index.parent / name) for name in names}
    lost = [f"{key}: not in {name}" for key, name in where.items() if key not in parts[name]]
    if lost:
        raise WeightsError(listed(f"{index} does not agree with its files:", lost))
    return {key: parts[name][key] for key, name in where.items()}


def abstract_params(
    shapes: Params, mesh: Mesh, dtype: str = "float32", trained: str | None = None
) -> Params:
    """What `load_params` fills: `shapes`, laid out on the mesh by the rules of vdx.parallel.

    dtype: of the kernels; what FLOAT32 names, or the regex `trained`, stays float32.
    """

    def one(path, leaf, sharding):
        name = path_str(path)
        kept = FLOAT32.search(name) or (trained and re.search(trained, name))
        return jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32 if kept else jnp.dtype(dtype), sharding=sharding
        )

    return jax.tree_util.tree_map_with_path(one, shapes, param_shardings(mesh, shapes))


Parts = dict[str, list[tuple[StoredArray, Place]]]


def match(source: Mapping[str, StoredArray], like: Params, rows: Sequence[Row]) -> Parts:
    """path of our parameter -> what fills it. Raises WeightsError that lists every key and every
    shape that disagrees; reads nothing."""
    parts: Parts = defaultdict(list)
    leaves, problems = flat(like), []
    for key, place in assign(source, like, rows).items():
        leaf, stored = leaves[place.path], source[key]
        shape = laid_out(place.layout.ours, stored.shape)
        want = leaf.shape if place.index is None else leaf.shape[1:]
        if shape != want:
            problems.append(f"{key}: is {shape} for {place.path} {want}")
        parts[place.path].append((stored, place))
    if problems:
        raise WeightsError(listed("These weights do not fit this model:", problems))
    return parts


def laid_out(layout: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that a layout makes of a shape, without an array behind it."""
    return layout(np.broadcast_to(np.uint8(0), shape)).shape


def load_params(
    source: Mapping[str, StoredArray],
    like: Params,
    rows: Sequence[Row],
    optional: str | None = None,
) -> Params:
    """Our parameters from files, of the shapes, types and shardings of `like`.

    optional: a regex of paths; what it finds and no file has is left out. Raises WeightsError as
    `match` does, before anything is read.
    """
    if optional:
        place = place_of(rows)
        filled = {found.path for key in source if (found := place(key))}
        filled |= set(absent(flat(like), rows))
        like = unflatten_dict(
            {
                path: leaf
                for path, leaf in flat(like).items()
                if path in filled or not re.search(optional, path)
            },
            sep="/",
        )
    parts = match(source, like, rows)
    # Waiting for each lets go of its copy on the host before the next is read.
    return unflatten_dict(
        {
            path: _load(leaf, parts.get(path, ())).block_until_ready()
            for path, leaf in flat(like).items()
        },
        sep="/",
    )


def _dims(network: Transformer) -> tuple[int, int, int, tuple[Any, ...]]:
    """Without what weights know nothing of: which blocks of a clip see which."""
    width, depth, heads, pattern = network.dims()
    specs = ({k: v for k, v in spec.items() if k not in BLOCKWISE} for spec in pattern)
    return width, depth, heads, tuple(s["name"] if len(s) == 1 else s for s in specs)


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
    """The parameters of `model` from the files of `theirs`, on the mesh.

    dtype: of the kernels. trained: a regex of paths that stay float32; those of them that the file
    does not have are left out. The blocks of its pattern may be others than theirs, or none. Raises
    WeightsError for a model that is another network, also where no array tells, and as
    `load_params`.
    """
    there, here = theirs.backbone, model.backbone
    facts: dict[str, Callable] = {
        "(width, depth, heads, pattern)": _dims,
        "hidden features": Transformer.hidden,
        **{
            name: operator.attrgetter(name)
            for name in (
                "channels",
                "patch",
                "activation",
                "rope_theta",
                "absolute",
                "sincos",
                "cross",
                "time_scale",
            )
        },
    }
    wrong = [
        f"config.model.backbone: {name} = {of(here)}, but the weights have {of(there)}"
        for name, of in facts.items()
        if of(here) != of(there)
    ]
    text = [m.get("embeddings", {}).get("length") for m in (model.signals, theirs.signals)]
    if text[0] != text[1]:
        wrong.append(f"config.model.signals.embeddings.length = {text[0]}, not {text[1]}")
    if wrong:
        raise WeightsError(listed(f"The model is not that of {path}:", wrong))
    like = abstract_params(
        jax.eval_shape(model.new_params, jax.random.key(0)), mesh, dtype, trained
    )
    return load_params(source, like, rows, trained)


def _load(leaf, parts: Sequence[tuple[StoredArray, Place]]) -> jax.Array:
    """One parameter. Every array of the file is looked at once, and every share that lies on
    this host is filled once, however many devices hold it."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])

    def bounds(index) -> tuple[tuple[int, int], ...]:
        return tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))

    shares = {
        bounds(index): np.zeros([b - a for a, b in bounds(index)], leaf.dtype)
        for index in sharding.addressable_devices_indices_map(leaf.shape).values()
    }
    for stored, place in parts:
        value = place.layout.ours(stored.read())
        for ends, share in shares.items():
            within = tuple(slice(*end) for end in ends)
            if place.index is None:
                share[...] = value[within]
            elif ends[0][0] <= place.index < ends[0][1]:
                share[place.index - ends[0][0]] = value[within[1:]]
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: shares[bounds(index)])
