"""The networks of a pretrained model: opened, checked, loaded, and rewritten.

The files may have the layouts of their makers, or vdx's own. That one has the same `config.json`
and a file of weights whose keys are the paths of our parameters, one layer of a stack at a time
("layers/q/kernel[3]"), and whose arrays have our layout.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdx.files import read_json_object, write_json
from vdx.interop.clip import FIELDS as CLIP_FIELDS
from vdx.interop.clip import (
    clip_names,
    clip_rows,
    clip_text_from_config,
    clip_vision_from_config,
)
from vdx.interop.config_ranges import read_config
from vdx.interop.image_vae import FIELDS as IMAGE_VAE_FIELDS
from vdx.interop.image_vae import image_vae_from_config, image_vae_rows
from vdx.interop.keymap import KEEP, Row, WeightsError, assign, flat, key_finder
from vdx.interop.load import (
    abstract_params,
    converted_shape,
    load_params,
    match_params,
    open_weights,
)
from vdx.interop.save import write_shards
from vdx.interop.stored_array import StoredArray, read_finite
from vdx.interop.t5 import FIELDS as T5_FIELDS
from vdx.interop.t5 import t5_from_config, t5_rows
from vdx.interop.video_vae import FIELDS as VAE_FIELDS
from vdx.interop.video_vae import video_vae_from_config, video_vae_rows
from vdx.interop.wan import open_wan
from vdx.interop.wan_config import FIELDS as WAN_FIELDS
from vdx.interop.wan_config import wan_from_config
from vdx.interop.wan_keys import distilled_prefix, wan_transformer_rows
from vdx.models.denoiser import Denoiser
from vdx.models.shapes import init_shapes, new_shapes
from vdx.types import Params

KeyRows = tuple[Row, ...]
IMAGE_VAE = "AutoencoderKL"  # the class of Stable Diffusion's

# An identity covers all numbers of arrays of at most WHOLE, and SAMPLES of larger ones.
WHOLE = 2**14
SAMPLES = 16
UNIDENTIFIED = ("parent", "name", "dtype")  # fields of a module that are not in an identity


@dataclasses.dataclass(frozen=True)
class Component:
    """A network in files."""

    config: Mapping[str, Any]  # config.json, as its makers write it
    source: Mapping[str, StoredArray]  # the arrays of the files
    module: Any  # our network
    shapes: Params  # its abstract parameters
    library_rows: KeyRows  # from the keys of diffusers or transformers to the parameters
    dtype: str  # of kernels on the mesh
    stem: str = "diffusion_pytorch_model"  # name of its file in the library's layout
    rows: KeyRows = ()  # from the keys of `source` to the parameters

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def check(self, mesh: Mesh) -> Params:
        """Return the abstract parameters on the mesh. Reads no array.

        Raises WeightsError for files of another network, ValueError if the mesh cannot shard it.
        """
        abstract = abstract_params(self.shapes, mesh, self.dtype)
        match_params(self.source, abstract, self.rows)
        return abstract

    def load(self, mesh: Mesh) -> Params:
        """Return the parameters on the mesh. Raises ValueError as `check` does."""
        return load_params(self.source, self.check(mesh), self.rows)

    def identity(self) -> str:
        """Return a digest of the network, the same for every layout of its files.

        It covers the fields of our network, and numbers of every parameter: all of small ones, a
        few of large ones, rounded to bfloat16. So a network that was trained further has another
        one. A change of a few numbers may go unnoticed.
        """
        fields = {
            field.name: getattr(self.module, field.name)
            for field in dataclasses.fields(self.module)
            if field.name not in UNIDENTIFIED
        }
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
        slots = assign(self.source, self.shapes, self.rows)
        for key, slot in sorted(slots.items(), key=lambda item: item[1].name):
            value = slot.layout.ours(self.source[key].read())
            places = np.arange(value.size)
            if value.size > WHOLE:
                places = np.linspace(0, value.size - 1, SAMPLES).astype(np.int64)
            numbers = value[np.unravel_index(places, value.shape)]
            digest.update(f"{slot.name} {value.size}".encode())
            digest.update(np.asarray(numbers, np.float32).astype(jnp.bfloat16).tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, own: bool) -> None:
        """Write the network to a folder, one array at a time.

        The dtypes are those of the files. own: in vdx's layout, not in that of diffusers or
        transformers.
        """
        outputs = list(self._outputs(own))
        plan = {
            output.key: (converted_shape(output.convert, output.stored.shape), output.stored.dtype)
            for output in outputs
        }
        arrays = (
            (output.key, output.convert(read_finite(output.old_key, output.stored)))
            for output in outputs
        )
        write_shards(folder, "model" if own else self.stem, plan, arrays)
        write_json(folder / "config.json", self.config)

    def _outputs(self, own: bool) -> Iterator["_Output"]:
        find_key = key_finder(self.library_rows)
        for key, slot in assign(self.source, self.shapes, self.rows).items():
            found = (slot.name, KEEP) if own else find_key(slot.name)
            assert found is not None, slot.name
            new_key, layout = found
            convert = _compose(slot.layout.ours, layout.theirs)
            yield _Output(new_key, key, self.source[key], convert)


class _Output(NamedTuple):
    """An array that is to be written."""

    key: str  # in the new file
    old_key: str  # in the old file
    stored: StoredArray  # in the old file
    convert: Callable[[np.ndarray], np.ndarray]  # from the old layout to the new


def _compose(
    first: Callable[[np.ndarray], np.ndarray], second: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: second(first(x))


def is_own(source: Mapping[str, StoredArray]) -> bool:
    """Return whether keys are those of vdx's layout: no other layout has a slash."""
    return any("/" in key for key in source)


def _source_rows(
    source: Mapping[str, StoredArray], shapes: Params, rows: KeyRows, library_rows: KeyRows
) -> KeyRows:
    """Return `rows`, or the rows of vdx's layout if the files have it."""
    if not is_own(source):
        return rows
    whole = [Row(path, path) for path in flat(shapes)]
    layers = [Row(f"{path}[{{i}}]", f"{path}[{{i}}]") for path in flat(shapes)]
    zero = [row for row in library_rows if not row.source]
    return (*whole, *layers, *zero)


def open_transformer(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    """Open a Wan transformer as a Denoiser.

    config: that of vdx's layout if its folder has none. Other layouts have it next to the weights,
    or it follows from the arrays. Raises WeightsError for a generator that was distilled to draw in
    a few steps: no pipeline here samples it as its makers do.
    """
    source = open_weights(path)
    prefix = distilled_prefix(source)
    if prefix is not None:
        raise WeightsError(
            f"{path} holds a generator of Self-Forcing or CausVid: its keys begin with {prefix!r}. "
            "It was distilled to draw a clip block by block in a few steps, and the few-step "
            "sampler that it needs is not there yet; an ordinary pipeline would draw wrong clips. "
            "Training reads it (config.weights, docs/temporal.md)."
        )

    # The config and, for keys in another layout, the names of diffusers.
    if is_own(source):
        config = config or read_config(path / "config.json", WAN_FIELDS)
        backbone, signals = wan_from_config(config)
    else:
        wan = open_wan(path)
        config = wan.config
        source = wan.source
        backbone = wan.backbone
        signals = wan.signals

    # The network. Its rows lead from the names of diffusers.
    module = Denoiser({**backbone, "dtype": dtype}, signals)
    shapes = new_shapes(module)
    rows = tuple(wan_transformer_rows(module))
    return Component(
        config=config,
        source=source,
        module=module,
        shapes=shapes,
        library_rows=rows,
        dtype=dtype,
        rows=_source_rows(source, shapes, rows, rows),
    )


def open_text_encoder(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    """Open a T5 encoder, or the text model of a CLIP.

    config: see `open_component`.
    """
    source = open_weights(path)
    config = config or _read_text_config(path / "config.json")
    if _is_clip(config):
        return _open_clip_text(clip_names(source), config, dtype)
    module = t5_from_config(config, dtype)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 4), jnp.bool_)
    shapes = init_shapes(module, ids, mask)
    library_rows = t5_rows(("shared.weight",), module)
    return Component(
        config=config,
        source=source,
        module=module,
        shapes=shapes,
        library_rows=library_rows,
        dtype=dtype,
        stem="model",
        rows=_source_rows(source, shapes, t5_rows(source, module), library_rows),
    )


def _is_clip(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type")).startswith("clip")


def _read_text_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a T5 or of a CLIP."""
    is_clip = _is_clip(read_json_object(path))
    return read_config(path, CLIP_FIELDS if is_clip else T5_FIELDS)


def _open_clip_text(
    source: Mapping[str, StoredArray], config: Mapping[str, Any], dtype: str
) -> Component:
    """Open the text model of a CLIP."""
    module = clip_text_from_config(config, dtype)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return _clip_component(source, config, module, "text_model.", ids)


def open_image_encoder(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    """Open the vision model of a CLIP.

    config: see `open_component`.
    """
    source = clip_names(open_weights(path))
    config = config or read_config(path / "config.json", CLIP_FIELDS)
    module = clip_vision_from_config(config, dtype)
    pixels = jax.ShapeDtypeStruct((1, module.image, module.image, 3), jnp.float32)
    return _clip_component(source, config, module, "vision_model.", pixels)


def _clip_component(
    source: Mapping[str, StoredArray],
    config: Mapping[str, Any],
    module: Any,
    prefix: str,
    inputs: jax.ShapeDtypeStruct,
) -> Component:
    """Return one model of a CLIP; prefix: of its keys in the files of transformers."""
    shapes = init_shapes(module, inputs)
    library_rows = clip_rows((prefix,), module)
    return Component(
        config=config,
        source=source,
        module=module,
        shapes=shapes,
        library_rows=library_rows,
        dtype=module.dtype,
        stem="model",
        rows=_source_rows(source, shapes, clip_rows(source, module), library_rows),
    )


def open_vae(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    """Open a video VAE, or an image VAE of Stable Diffusion.

    config: see `open_component`.
    """
    source = open_weights(path)
    config = config or _read_vae_config(path / "config.json")
    if config.get("_class_name") == IMAGE_VAE:
        return _open_image_vae(source, config, dtype)
    module = video_vae_from_config(config, dtype)
    _, side = module.rates
    latent_pixel = jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
    shapes = init_shapes(module, latent_pixel)

    library_rows = video_vae_rows(module)
    # The original's keys differ from those of diffusers.
    rows = video_vae_rows(module, original="conv1.weight" in source)
    return Component(
        config=config,
        source=source,
        module=module,
        shapes=shapes,
        library_rows=library_rows,
        dtype=dtype,
        rows=_source_rows(source, shapes, rows, library_rows),
    )


def _read_vae_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a video VAE or of an image VAE."""
    is_image = read_json_object(path).get("_class_name") == IMAGE_VAE
    return read_config(path, IMAGE_VAE_FIELDS if is_image else VAE_FIELDS)


def _open_image_vae(
    source: Mapping[str, StoredArray], config: Mapping[str, Any], dtype: str
) -> Component:
    """Open an image VAE."""
    module = image_vae_from_config(config, dtype)
    side = 2 ** len(module.block_out_channels)
    shapes = init_shapes(module, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    rows = image_vae_rows()
    return Component(
        config=config,
        source=source,
        module=module,
        shapes=shapes,
        library_rows=rows,
        dtype=dtype,
        rows=_source_rows(source, shapes, rows, rows),
    )


class OpenComponent(Protocol):
    """A function that opens one kind of network."""

    def __call__(self, path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
        """Open the network. Raises ValueError for files of another one."""


class ComponentKind(NamedTuple):
    """A row of COMPONENTS."""

    open: OpenComponent
    always_float32: bool  # ignores the dtype: its makers run it so, and it is small


COMPONENTS = {
    "text_encoder": ComponentKind(open_text_encoder, always_float32=False),
    "image_encoder": ComponentKind(open_image_encoder, always_float32=True),
    "transformer": ComponentKind(open_transformer, always_float32=False),
    "transformer_2": ComponentKind(open_transformer, always_float32=False),
    "vae": ComponentKind(open_vae, always_float32=True),
}


def open_component(
    name: str, path: str | Path, dtype: str, config: Mapping[str, Any] | None = None
) -> Component:
    """Open a row of COMPONENTS in a file or folder. Reads headers only.

    config: the config.json of files that have none next to them. Raises ValueError for files of
    another network.
    """
    kind = COMPONENTS[name]
    if kind.always_float32:
        dtype = "float32"
    return kind.open(Path(path), config, dtype)
