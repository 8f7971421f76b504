"""A pretrained video model: its networks and how its makers sample it.

Three kinds of folders are read: those of diffusers (`model_index.json` and a folder for each
network), those that vdx.convert writes (the same in another layout), and those of the original Wan
(vdx.interop.wan_original). Opening one reads headers and JSON only, and reports everything that is
wrong with it.
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

from vdx.config.ranges import Fraction
from vdx.files import read_json_object, write_json
from vdx.interop.components import COMPONENTS, Component, open_component
from vdx.interop.config_ranges import read_config
from vdx.interop.image_processor import processor_config, processor_differences
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.save import empty_folder
from vdx.interop.schedulers import FIELDS as SCHEDULER_FIELDS
from vdx.interop.schedulers import Schedule, schedule_of
from vdx.interop.stored_array import StoredArray

VACE = "WanVACEPipeline"
PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", VACE)
INDEX = "model_index.json"
# Fields of the index that are read. A part is [library, class], of nulls if it is not there.
INDEX_FIELDS: dict[str, Any] = {
    "_class_name": str,
    "boundary_ratio": Fraction | None,
    "expand_timesteps": bool | None,
    **dict.fromkeys(COMPONENTS, tuple[str | None, str | None] | None),
}
SCHEDULER = Path("scheduler", "scheduler_config.json")
IMAGE_PROCESSOR = Path("image_processor", "preprocessor_config.json")
EXPERTS = ("transformer", "transformer_2")  # for high and for low noise levels, or one for all
# An entry of the index that vdx.convert writes: whose defaults the model has. diffusers ignores it.
DEFAULTS = "_defaults"
OFFICIAL = "official"  # its makers'
# Our timesteps of a scheduler -> those of the makers' own scheduler of that name.
MAKERS_TIMESTEPS = {"diffusers_unipc": "wan_unipc", "diffusers_dpmpp": "wan_dpmpp"}
SAMPLE_BYTES = 1024  # read at the beginning, the middle and the end of every array


@dataclasses.dataclass(frozen=True)
class PretrainedModel:
    """A pretrained video model in a folder."""

    path: Path
    dtype: str  # of the kernels and matrix products of the text encoder and the transformers
    index: Mapping[str, Any]  # its model_index.json
    scheduler: Mapping[str, Any]  # its scheduler_config.json
    tokenizer: Path  # the folder of its tokenizer
    components: Mapping[str, Component]  # by the names of COMPONENTS

    @property
    def experts(self) -> list[Component]:
        """One transformer, or one for high and one for low noise levels."""
        return [self.components[name] for name in EXPERTS if name in self.components]

    @property
    def boundary(self) -> float:
        """The noise level in [0, 1] from which on the first of two experts is evaluated."""
        return self.index.get("boundary_ratio") or 0.0

    @property
    def clamps_first_frame(self) -> bool:
        """An image becomes the first latent frame, which stays unchanged (TI2V)."""
        return bool(self.index.get("expand_timesteps"))

    @property
    def signals(self) -> Mapping[str, Mapping[str, Any]]:
        """The conditioning signals of the transformers."""
        return self.experts[0].module.signals

    @property
    def reads_images(self) -> bool:
        """The clip may begin with an image."""
        return self.clamps_first_frame or "concat" in self.signals

    @property
    def reads_control(self) -> bool:
        """A video, a mask and reference images control the clip (VACE)."""
        return "control" in self.signals

    @property
    def official(self) -> bool:
        """The folder was converted from the makers' own, and has their defaults."""
        return self.index.get(DEFAULTS) == OFFICIAL

    def schedule(self) -> Schedule:
        """Return the sampler of the model's scheduler.

        Its times are the makers' in a folder converted from theirs. Raises WeightsError for a
        scheduler that vdx does not have.
        """
        schedule = schedule_of(self.scheduler, self.path)
        if not self.official:
            return schedule
        timesteps = MAKERS_TIMESTEPS.get(schedule.timesteps, schedule.timesteps)
        return schedule._replace(timesteps=timesteps)

    def check(self, mesh: Mesh) -> None:
        """Raise ValueError if a file does not fit its network, or a network the mesh."""
        for name, component in self.components.items():
            with _naming(self.path / name):
                component.check(mesh)

    def identity(self) -> str:
        """Return a digest that identifies the weights, from a few megabytes of them.

        It covers all names, types and shapes, SAMPLE_BYTES from the beginning, the middle and the
        end of every array, the configs and the tokenizer. A model that was trained further or
        rounded differs in all of its arrays. A change of a few numbers may go unnoticed.
        """
        digest = hashlib.sha256()
        for name, component in sorted(self.components.items()):
            digest.update(json.dumps([name, component.config], sort_keys=True).encode())
            for key, stored in sorted(component.source.items()):
                digest.update(f"{key} {stored.dtype} {stored.shape}".encode())
                for sample in _samples(stored):
                    digest.update(sample)

        digest.update(json.dumps([self.index, self.scheduler], sort_keys=True).encode())
        for path in sorted(self.tokenizer.rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def save(self, out: Path, own: bool) -> None:
        """Write the whole model to a new folder, one array at a time.

        own: in vdx's layout, not in that of diffusers. Raises WeightsError for a folder that is not
        empty.
        """
        empty_folder(out)
        for name, component in self.components.items():
            component.save(out / name, own)
        shutil.copytree(self.tokenizer, out / "tokenizer")
        write_json(out / SCHEDULER, self.scheduler)
        if "image_encoder" in self.components:
            size = self.components["image_encoder"].module.image
            write_json(out / IMAGE_PROCESSOR, processor_config(size))
        write_json(out / INDEX, self.index)  # last: without it the folder is no model


def _samples(stored: StoredArray) -> Iterator[bytes]:
    """Yield bytes from the beginning, the middle and the end of an array."""
    size = stored.num_bytes
    middle = max(0, size // 2 - SAMPLE_BYTES // 2)
    end = max(0, size - SAMPLE_BYTES)
    with stored.file.open("rb") as file:
        # The order in which Python iterates over this set is part of every identity.
        for start in {0, middle, end}:
            file.seek(stored.offset + start)
            yield file.read(min(SAMPLE_BYTES, size - start))


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Add the name of a folder to the errors that are raised inside."""
    try:
        yield
    except ValueError as error:
        if str(folder) in str(error):
            raise
        raise WeightsError(f"{folder}: {error}") from error


def open_pretrained(path: str | Path, dtype: str = "float32") -> PretrainedModel:
    """Open the model in a folder of diffusers or of vdx.convert.

    dtype: see PretrainedModel. Raises WeightsError for a folder that is no model, lacks a part, or
    is of a kind that vdx does not generate with; ValueError for parts that cannot be read.
    """
    path = Path(path)
    if not (path / INDEX).is_file():
        raise WeightsError(_no_model(path))
    index = read_config(path / INDEX, INDEX_FIELDS)

    # What kind of model is it, and is it complete?
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise WeightsError(f"{path} is a {pipeline}; vdx generates with {', '.join(PIPELINES)}.")

    names = {"text_encoder", "transformer", "vae"}
    # An entry is [library, class], of nulls for a part that the model does not have.
    names |= {name for name in COMPONENTS if (index.get(name) or [None])[0]}
    folders = [name for name in COMPONENTS if name in names]
    missing = [name for name in (*folders, "tokenizer", "scheduler") if not (path / name).is_dir()]
    if missing:
        head = f"{path} lacks folders that a {pipeline} needs. Download them:"
        raise WeightsError(listed(head, missing))

    # Its networks.
    components = {}
    for name in folders:
        with _naming(path / name):
            components[name] = open_component(name, path / name, dtype)

    model = PretrainedModel(
        path=path,
        dtype=dtype,
        index=index,
        scheduler=read_config(path / SCHEDULER, SCHEDULER_FIELDS),
        tokenizer=path / "tokenizer",
        components=components,
    )
    check_consistency(model)
    return model


def _no_model(path: Path) -> str:
    """Return the message for a folder without an index, or for no folder."""
    advice = (
        "give the folder of a model as diffusers saves it, or as python -m vdx.convert writes it "
        "(which also reads the original Wan's)."
    )
    if not path.is_dir():
        return f"{path} is not a folder: {advice}"
    message = f"{path} has no {INDEX}: {advice}"
    names = sorted(file.name for file in path.iterdir())[:8]
    if names:
        message += f" There are: {', '.join(names)}."
    return message


def check_consistency(model: PretrainedModel) -> None:
    """Raise WeightsError for parts that do not belong together."""
    problems = [
        *_expert_problems(model),
        *_latent_problems(model),
        *_encoder_problems(model),
        *_image_processor_problems(model),
    ]
    if problems:
        head = f"{model.path} is not a model that vdx generates with:"
        raise WeightsError(listed(head, problems))


def _expert_problems(model: PretrainedModel) -> list[str]:
    """List disagreements between the index and the transformers."""
    problems = []
    if ("transformer_2" in model.components) != bool(model.boundary):
        problems.append(f"boundary_ratio = {model.boundary or None} goes with a transformer_2")
    if any(expert.module.signals != model.signals for expert in model.experts):
        problems.append("transformer_2 reads other conditions than transformer")
    if model.reads_control != (model.index["_class_name"] == VACE):
        problems.append(f"control blocks in the transformer go with a {VACE}")
    return problems


def _latent_problems(model: PretrainedModel) -> list[str]:
    """List disagreements between the channels of the transformer and of the VAE."""
    vae = model.components["vae"].module
    latents = vae.z_dim
    frames, side = vae.rates
    channels = model.experts[0].module.channels
    problems = []

    if channels != latents:
        problems.append(f"the transformer predicts {channels} channels, the VAE has {latents}")

    # The latents of an image, and a mask of the pixel frames in a latent one.
    concat = model.signals.get("concat", {}).get("channels", 0)
    wanted = frames + latents
    if concat not in (0, wanted):
        problems.append(
            f"the transformer reads {concat} channels in addition to the clip, not {wanted}: a "
            "mask and latents"
        )

    # Latents of what stays and of what is generated, and a mask of the pixels in a latent one.
    control = model.signals.get("control", {}).get("channels", 0)
    wanted = 2 * latents + side**2
    if control not in (0, wanted):
        problems.append(
            f"the control blocks read {control} channels, not {wanted}: latents of what stays and "
            "of what is generated, and a mask"
        )
    return problems


def _encoder_problems(model: PretrainedModel) -> list[str]:
    """List encoders whose features have another width than the transformer reads."""
    problems = []
    tokens = model.signals.get("image_tokens")
    encoder = model.components.get("image_encoder")
    if tokens and (encoder is None or encoder.module.width != tokens["features"]):
        problems.append(
            "the transformer reads features of an image_encoder of another width or none"
        )
    text_width = model.components["text_encoder"].module.width
    if model.signals["embeddings"]["features"] != text_width:
        problems.append("the transformer reads features of another text_encoder")
    return problems


def _image_processor_problems(model: PretrainedModel) -> list[str]:
    """List what the model's image processor does that ours does not."""
    config_file = model.path / IMAGE_PROCESSOR
    encoder = model.components.get("image_encoder")
    if encoder is None or not config_file.exists():
        return []
    return processor_differences(read_json_object(config_file), encoder.module.image)
