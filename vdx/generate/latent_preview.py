"""Sample grids of a model of latents, decoded by a pretrained model's VAE.

The run's own network and `config.sample` draw the latents. The text encoder and the VAE are those
of the pretrained model that the run starts from. Each is on the mesh only while it is evaluated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vdx.generate.clip import Clip, iter_uint8_frames
from vdx.generate.generator import Generator
from vdx.generate.pretrained import PretrainedGenerator
from vdx.generate.pretrained_request import complete, default_dtype
from vdx.interop.keymap import WeightsError
from vdx.interop.pretrained import INDEX, PretrainedModel, open_pretrained
from vdx.interop.wan_original import LOCATIONS, open_original
from vdx.models.adapters.lora import Adapted
from vdx.parallel import MeshSpec
from vdx.types import Params

__all__ = ["LatentPreview", "open_around", "open_preview"]


@dataclasses.dataclass(frozen=True)
class LatentPreview:
    """Draws the same clips again, with other parameters of the network each time."""

    generator: Generator  # of the run
    mesh: Mesh  # of the run
    decoder: PretrainedGenerator  # on a mesh of its own: each device has the whole VAE
    prompts: tuple[str, ...]  # clip i has prompt i and seed i
    conditions: Mapping[str, np.ndarray]  # entries of the batch, each [n ...], one for a prompt
    latent_frames: int
    fps: float

    def draw(self, params: Params | Adapted) -> list[Clip]:
        """Draw the clips with these parameters. Raises NotFinite."""
        with jax.set_mesh(self.mesh):
            latents = self.generator(
                params,
                self.prompts,
                range(len(self.prompts)),
                num_frames=self.latent_frames,
                fps=self.fps,
                controls=self.conditions,
            )
        clips = []
        for i, pieces in enumerate(self.decoder.decode_clips(latents, exact=False)):
            frames = np.stack(list(iter_uint8_frames(pieces)))
            clips.append(Clip(frames, self.fps, self.prompts[i], i, {}))
        return clips


def open_around(weights: str | Sequence[str] | None) -> PretrainedModel:
    """Open the pretrained model that a transformer is a part of. Reads headers only.

    weights: `config.weights`, a folder or file in the layout of diffusers or of the original Wan.
    Raises WeightsError if no model is there, and as `open_pretrained` does.
    """
    if not isinstance(weights, str):
        raise WeightsError(f"config.weights = {weights!r} is no part of a pretrained model.")

    # FOLDER, FOLDER/transformer, or a file in either.
    path = Path(weights)
    for folder in (path, path.parent, path.parent.parent):
        if (folder / INDEX).is_file():
            return open_pretrained(folder, default_dtype())
        if any(folder.glob(LOCATIONS["vae"][0])):
            return open_original(folder, {}, default_dtype())
    raise WeightsError(
        f"config.weights = {weights} has no VAE and text encoder next to it. Expected a part of "
        f"a whole model, such as FOLDER/transformer with FOLDER/{INDEX}."
    )


def open_preview(
    folder: PretrainedModel,
    generator: Generator,
    mesh: Mesh,
    prompts: Sequence[str],
    examples: Sequence[Mapping[str, Any]],
) -> LatentPreview:
    """Encode the prompts and return what draws their clips.

    examples: ready examples of training clips of one shape. Clip i has the size and, other than
    the text, the conditions of example i, so that a model of image to video has its images.
    Raises ConfigError for latents that the model cannot draw.
    """
    # The size of the clips, in latents and in pixels.
    example = examples[0]
    frames, height, width, _ = example["latents"].shape
    generator.check((frames, *generator.frame_shape))
    rate, side = folder.components["vae"].module.rates
    settings = {
        "prompts": tuple(prompts),
        "mesh": dict(mesh.shape),
        "num_frames": 1 + (frames - 1) * rate,
        "height": height * side,
        "width": width * side,
        "negative_prompt": "",
    }
    request = complete(folder, settings)
    pretrained = PretrainedGenerator(folder, request, mesh, lambda line: None)
    # Few of a VAE's sizes divide by the devices of a pod.
    whole = MeshSpec(data=-1).make(mesh.devices.flatten().tolist())
    decoder = PretrainedGenerator(folder, request, whole, lambda line: None)

    # The text encoder is released here, before the training state is made.
    with jax.set_mesh(mesh):
        text = pretrained.encode_text()
    conditions = {name: values[: len(prompts)] for name, values in text.items()}

    # The other signals that the model reads.
    for name in generator.model.conditioning.dummy_batch():
        if name in example and name not in conditions:
            values = [examples[i % len(examples)][name] for i in range(len(prompts))]
            conditions[name] = np.stack(values)
    return LatentPreview(
        generator, mesh, decoder, tuple(prompts), conditions, frames, float(example["fps"])
    )
