"""The networks of a public model, one by one: files opened, checked, put on the mesh, rewritten.

Besides the layouts of their makers each may be in vdx's own: the same `config.json`, and a file
whose keys are the paths of our parameters, a layer of a stack at a time ("layers/q/kernel[3]"),
whose arrays lie as ours do.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdx.files import read_json, write_json
from vdx.interop.encoders import (
    clip_names,
    clip_rows,
    clip_vision_from_config,
    t5_from_config,
    t5_rows,
)
from vdx.interop.keymap import KEEP, Layout, Row, assign, flat, naming
from vdx.interop.load import abstract_params, laid_out, load_params, match, open_weights
from vdx.interop.save import write_parts
from vdx.interop.stored_array import StoredArray
from vdx.interop.vae import video_vae_from_config, video_vae_rows
from vdx.interop.wan import open_wan
from vdx.interop.wan_config import wan_from_config
from vdx.interop.wan_keys import wan_transformer_rows
from vdx.models.denoiser import Denoiser
from vdx.types import Params

Rows = tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Component:
    """A network in files.

    config: as its makers write it. module: ours. shapes: its parameters. rows: from the keys of
    `source` to them; public: the same from the keys that diffusers or transformers use. dtype:
    of kernels on the mesh. stem: the name of its file there.
    """

    config: Mapping[str, Any]
    source: Mapping[str, StoredArray]
    module: Any
    shapes: Params
    public: Rows
    dtype: str
    stem: str = "diffusion_pytorch_model"
    rows: Rows = ()

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.shapes))

    def check(self, mesh: Mesh) -> Params:
        """The abstract parameters on the mesh. Reads nothing. Raises WeightsError for files that
        are not of this network, ValueError if it cannot be laid out."""
        like = abstract_params(self.shapes, mesh, self.dtype)
        match(self.source, like, self.rows)
        return like

    def load(self, mesh: Mesh) -> Params:
        return load_params(self.source, self.check(mesh), self.rows)

    def save(self, folder: Path, own: bool) -> None:
        """The same arrays in vdx's layout or in that of diffusers and transformers, in the types
        that the files have; one array at a time."""
        layouts = {key: (stored, layout) for key, stored, layout in self._renamed(own)}
        plan = {
            key: (laid_out(layout, stored.shape), stored.dtype)
            for key, (stored, layout) in layouts.items()
        }
        arrays = ((key, layout(stored.read())) for key, (stored, layout) in layouts.items())
        write_parts(folder, "model" if own else self.stem, plan, arrays)
        write_json(folder / "config.json", self.config)

    def _renamed(
        self, own: bool
    ) -> Iterator[tuple[str, StoredArray, Callable[[np.ndarray], np.ndarray]]]:
        name = naming(self.public)
        for key, place in assign(self.source, self.shapes, self.rows).items():
            known: tuple[str, Layout] | None = (place.slot, KEEP) if own else name(place.slot)
            assert known is not None, place.slot
            yield known[0], self.source[key], _both(place.layout, known[1])


def _both(here: Layout, there: Layout) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: there.theirs(here.ours(x))


def is_own(source: Mapping[str, StoredArray]) -> bool:
    """Whether these are keys of vdx's layout: no public one has a slash."""
    return any("/" in key for key in source)


def _component(source: Mapping[str, StoredArray], rows: Rows, **fields) -> Component:
    """`rows` are those of the file, unless it is in vdx's own layout."""
    if is_own(source):
        rows = (
            *(
                row
                for path in flat(fields["shapes"])
                for row in (Row(path, path), Row(f"{path}[{{i}}]", f"{path}[{{i}}]"))
            ),
            *(row for row in fields["public"] if not row.source),
        )  # ours, and zero
    return Component(source=source, rows=rows, **fields)


def _shapes(module: Any, *example: Any) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), *example)["params"]


def open_transformer(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    """A Wan transformer as a Denoiser; `config` is that beside the weights or found in them."""
    source = open_weights(path)
    if is_own(source):
        config = config or read_json(path / "config.json")
        backbone, signals = wan_from_config(config)
    else:
        wan = open_wan(path)
        config, source, backbone, signals = wan.config, wan.source, wan.backbone, wan.signals
    module = Denoiser({**backbone, "dtype": dtype}, signals)
    rows = tuple(wan_transformer_rows(module))
    return _component(
        source,
        rows,
        config=config,
        module=module,
        public=rows,
        dtype=dtype,
        shapes=jax.eval_shape(module.new_params, jax.random.key(0)),
    )


def open_text_encoder(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    source = open_weights(path)
    config = config or read_json(path / "config.json")
    module = t5_from_config(config, dtype)
    return _component(
        source,
        t5_rows(source, module),
        config=config,
        module=module,
        dtype=dtype,
        public=t5_rows(("shared.weight",), module),
        stem="model",
        shapes=_shapes(module, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)),
    )


def open_image_encoder(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    source = clip_names(open_weights(path))
    config = config or read_json(path / "config.json")
    module = clip_vision_from_config(config, dtype)
    return _component(
        source,
        clip_rows(source, module),
        config=config,
        module=module,
        dtype=dtype,
        stem="model",
        public=clip_rows(("vision_model.",), module),
        shapes=_shapes(module, jnp.zeros((1, module.image, module.image, 3))),
    )


def open_vae(path: Path, config: Mapping[str, Any] | None, dtype: str) -> Component:
    source = open_weights(path)
    config = config or read_json(path / "config.json")
    module = video_vae_from_config(config, dtype)
    public = video_vae_rows(module)
    rows = video_vae_rows(module, original=True) if "conv1.weight" in source else public
    side = module.rates[1]
    return _component(
        source,
        rows,
        config=config,
        module=module,
        public=public,
        dtype=dtype,
        shapes=_shapes(module, jnp.zeros((1, 1, side, side, 3))),
    )


# (opens it, in float32 whatever is asked for: as the makers run it, and they are small)
COMPONENTS: dict[str, tuple[Callable[[Path, Mapping[str, Any] | None, str], Component], bool]] = {
    "text_encoder": (open_text_encoder, False),
    "image_encoder": (open_image_encoder, True),
    "transformer": (open_transformer, False),
    "transformer_2": (open_transformer, False),
    "vae": (open_vae, True),
}


def open_component(
    name: str, path: str | Path, dtype: str, config: Mapping[str, Any] | None = None
) -> Component:
    """A row of COMPONENTS in a file or folder. config: for files that come without one.

    Reads headers. Raises ValueError for what is not such a network.
    """
    opener, exact = COMPONENTS[name]
    return opener(Path(path), config, "float32" if exact else dtype)
