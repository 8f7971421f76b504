"""A public video model: the networks of a folder and how its makers draw clips with them.

Read are folders of diffusers (`model_index.json` and a folder for each network), those that
vdx.convert writes (the same in another layout), and those of the original Wan. Opening one reads
headers and JSON alone, and says all that is wrong with it.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from vdx.files import read_json, write_json
from vdx.interop.components import COMPONENTS, Component, open_component
from vdx.interop.image_processor import _alike, processor
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.save import empty_folder
from vdx.interop.schedulers import SCHEDULERS
from vdx.interop.stored_array import StoredArray

VACE = "WanVACEPipeline"
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", VACE)
INDEX = "model_index.json"
EXPERTS = ("transformer", "transformer_2")  # of high and of low noise, or of all
SAMPLE = 1024  # bytes looked at in the beginning, middle and end of every array


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """index: its model_index.json. scheduler: its scheduler_config.json. tokenizer: a folder.
    dtype: of the kernels and matrix products of its text encoder and transformers."""

    path: Path
    dtype: str
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: Path
    components: Mapping[str, Component]

    @property
    def experts(self) -> list[Component]:
        """One transformer, or that of high and that of low noise."""
        return [self.components[name] for name in EXPERTS if name in self.components]

    @property
    def boundary(self) -> float:
        """The noise level in [0, 1] from which on the first expert is asked."""
        return self.index.get("boundary_ratio") or 0.0

    @property
    def clamps_first_frame(self) -> bool:
        """An image enters as the clip's first latent frame, which stays as it is (TI2V)."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def signals(self) -> Mapping[str, Mapping[str, Any]]:
        return self.experts[0].module.signals

    @property
    def reads_images(self) -> bool:
        return self.clamps_first_frame or "concat" in self.signals

    @property
    def reads_control(self) -> bool:
        """A video, a mask and pictures of what is to be seen lead the clip (VACE)."""
        return "control" in self.signals

    def schedule(self) -> dict[str, Any]:
        """{"sampler", "timesteps", "shift"} as the scheduler has them.

        Raises WeightsError for a scheduler that vdx has nothing like.
        """
        name = str(self.scheduler.get("_class_name"))
        if name not in SCHEDULERS:
            raise WeightsError(
                f"The scheduler of {self.path} is {name}; known are "
                f"{', '.join(SCHEDULERS)}. Say --sampler, --timesteps and --shift."
            )
        sampler, timesteps, shift, wanted = SCHEDULERS[name]
        other = [
            f"{key} = {self.scheduler[key]!r}, not {value!r}"
            for key, value in wanted.items()
            if (self.scheduler.get(key, value) or None) != (value or None)
        ]
        if other:
            raise WeightsError(
                listed(
                    f"The {name} of {self.path} is not one that vdx has; say "
                    "--sampler, --timesteps and --shift to go on without it:",
                    other,
                )
            )
        return {
            "sampler": sampler,
            "timesteps": timesteps,
            "shift": float(self.scheduler.get(shift, 1.0)),
        }

    def check(self, mesh: Mesh) -> None:
        """Raises ValueError if a file does not fit its network, or a network the mesh."""
        for name, component in self.components.items():
            with _of(self.path / name):
                component.check(mesh)

    def identity(self) -> str:
        """A digest by which these weights are known again.

        Of all names, types and shapes, of a kilobyte from the beginning, the middle and the end
        of every array, of the configs and of the tokenizer. A model that was trained further or
        rounded differs in all of its arrays; a change of a few numbers may go unseen. Reads a few
        megabytes.
        """
        found = hashlib.sha256()
        for name, component in sorted(self.components.items()):
            found.update(json.dumps([name, component.config], sort_keys=True).encode())
            for key, stored in sorted(component.source.items()):
                found.update(f"{key} {stored.dtype} {stored.shape}".encode())
                for piece in _pieces(stored):
                    found.update(piece)
        found.update(json.dumps([self.index, self.scheduler], sort_keys=True).encode())
        for path in sorted(self.tokenizer.rglob("*")):
            if path.is_file():
                found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()

    def save(self, out: Path, own: bool) -> None:
        """The whole model in a new folder, in vdx's layout or in that of diffusers. Holds one
        array at a time. Raises WeightsError for a folder that is not empty."""
        empty_folder(out)
        for name, component in self.components.items():
            component.save(out / name, own)
        shutil.copytree(self.tokenizer, out / "tokenizer")
        write_json(out / "scheduler" / "scheduler_config.json", self.scheduler)
        if "image_encoder" in self.components:
            size = self.components["image_encoder"].module.image
            write_json(out / "image_processor" / "preprocessor_config.json", processor(size))
        write_json(out / INDEX, self.index)  # last: without it the folder is no model


def _pieces(stored: StoredArray) -> Iterator[bytes]:
    size = stored.extent() * stored.dtype.itemsize
    with stored.file.open("rb") as f:
        for start in {0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)}:
            f.seek(stored.offset + start)
            yield f.read(min(SAMPLE, size - start))


@contextlib.contextmanager
def _of(folder: Path) -> Iterator[None]:
    """Names a folder in the errors that are raised inside."""
    try:
        yield
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise WeightsError(f"{folder}: {error}") from error


def open_pretrained(path: str | Path, dtype: str = "float32") -> PretrainedModel:
    """The model in a folder of diffusers or of vdx.convert. dtype: see PublicModel.

    Raises WeightsError for a folder that is none, lacks a part, or is of a kind that vdx does
    not draw from; ValueError for parts that cannot be read.
    """
    path = Path(path)
    if not (path / INDEX).is_file():
        there = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else []
        raise WeightsError(
            f"{path} {'has no ' + INDEX if path.is_dir() else 'is not a folder'}: give the folder "
            "of a model as diffusers saves it, or as python -m vdx.convert writes it (which also "
            "reads the original Wan's)." + (f" There are: {', '.join(there)}." if there else "")
        )
    index = read_json(path / INDEX)
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise WeightsError(f"{path} is a {name}; vdx draws from {', '.join(PIPELINES)}.")
    wanted = ["text_encoder", "transformer", "vae"] + [
        part for part in COMPONENTS if (index.get(part) or [None])[0]
    ]
    missing = [
        part
        for part in dict.fromkeys([*wanted, "tokenizer", "scheduler"])
        if not (path / part).is_dir()
    ]
    if missing:
        raise WeightsError(
            listed(f"{path} lacks folders that a {name} needs. Download them:", missing)
        )
    components = {}
    for part in COMPONENTS:
        if part in wanted:
            with _of(path / part):
                components[part] = open_component(part, path / part, dtype)
    return assemble(
        path,
        dtype,
        index,
        read_json(path / "scheduler" / "scheduler_config.json"),
        path / "tokenizer",
        components,
    )


def assemble(*fields: Any) -> PretrainedModel:
    """A PublicModel of its fields. Raises WeightsError for parts that do not belong together."""
    model = PretrainedModel(*fields)
    _check(model)
    return model


def _check(model: PretrainedModel) -> None:
    """Raises WeightsError for parts that do not belong together."""
    parts, first = model.components, model.experts[0]
    encoder, tokens = parts.get("image_encoder"), model.signals.get("image_tokens")
    latents = parts["vae"].module.z_dim
    given = model.signals.get("concat", {}).get("channels", 0)
    control = model.signals.get("control", {}).get("channels", 0)
    mask, side = parts["vae"].module.rates
    other = [e for e in model.experts[1:] if e.module.signals != first.module.signals]
    problems = [
        message
        for wrong, message in (
            (
                ("transformer_2" in parts) != bool(model.boundary),
                f"boundary_ratio = {model.boundary or None} goes with a transformer_2",
            ),
            (other, "transformer_2 reads other conditions than transformer"),
            (
                model.reads_control != (model.index["_class_name"] == VACE),
                f"control blocks in the transformer go with a {VACE}",
            ),
            (
                control not in (0, 2 * latents + side**2),
                f"the control blocks read {control} channels, not {2 * latents + side**2}, latents of "
                "what stays and what does not, and a mask",
            ),
            (
                first.module.channels != latents,
                f"the transformer draws {first.module.channels} channels, the VAE has {latents}",
            ),
            (
                given not in (0, mask + latents),
                f"the transformer reads {given} channels beside the clip, not {mask + latents}, a mask "
                "and latents",
            ),
            (
                tokens and (encoder is None or encoder.module.width != tokens["features"]),
                "the transformer reads features of an image_encoder of another width or none",
            ),
            (
                model.signals["embeddings"]["features"] != parts["text_encoder"].module.width,
                "the transformer reads features of another text_encoder",
            ),
        )
        if wrong
    ]
    if encoder is not None:
        said = model.path / "image_processor" / "preprocessor_config.json"
        does = processor(encoder.module.image)
        problems += [
            f"image_processor: {key} = {value!r}, not {does[key]!r}"
            for key, value in (read_json(said) if said.exists() else {}).items()
            if key in does and key != "image_processor_type" and not _alike(value, does[key])
        ]
    if problems:
        raise WeightsError(listed(f"{model.path} is not a model that vdx draws from:", problems))
