"""The encoders of a pretrained model, as vdx.prepare needs them.

Two kinds of folders are read: those of Wan, and those of diffusers with an image VAE, such as
Stable Diffusion 1.5 (CLIP) and Latte (T5), which encodes every frame by itself. The latter's
clips may have features of their first frame: by CLIP in a folder `image_encoder`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vdx.files import read_json_object
from vdx.generate.pretrained_request import size_unit
from vdx.interop.components import Component, open_component
from vdx.interop.keymap import WeightsError, listed
from vdx.interop.pretrained import INDEX, PIPELINES, open_pretrained
from vdx.models.encoders.clip import CLIPTextModel
from vdx.models.encoders.text_tokens import PromptTokenizer
from vdx.models.vae.image_vae import ImageVAE

__all__ = ["EncoderModel", "open_encoders"]

LONGEST_WAN = 512  # tokens of a prompt
LENGTHS_T5 = (64, 128, 256)  # padded lengths of prompts; the last is the longest


@dataclasses.dataclass(frozen=True)
class EncoderModel:
    """Encoders in a folder, and what the network reads of their results."""

    path: Path
    components: Mapping[str, Component]  # vae, text_encoder, and perhaps image_encoder
    rate: int  # frames of a latent frame after the first
    unit: int  # of which heights and widths are multiples, in pixels
    lengths: tuple[int, ...]  # padded lengths of prompts
    is_padded: bool  # the network reads the features of the padding too (CLIP)
    longest: int  # tokens that the network reads
    has_concat: bool = False  # it reads the latents of the first frame and a mask

    @property
    def has_tokens(self) -> bool:
        """The network reads CLIP's features of the first frame."""
        return "image_encoder" in self.components

    def tokenizer(self) -> "Tokenize":
        """Return tokenize(prompts) -> (ids [b l], mask [b l])."""
        return Tokenize(self)


class Tokenize:
    """Prompts to token ids; the mask is true on tokens whose features are stored."""

    def __init__(self, model: EncoderModel) -> None:
        """Read the tokenizer of a model."""
        self.is_padded = model.is_padded
        clean = not model.is_padded  # CLIP's prompts are not cleaned
        self.tokenize = PromptTokenizer(model.path / "tokenizer", model.lengths, clean)

    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids int32 [b l], mask bool [b l])."""
        ids, mask = self.tokenize(prompts)
        return ids, mask | self.is_padded


def open_encoders(path: Path, dtype: str) -> EncoderModel:
    """Open the encoders in a folder; reads headers alone.

    dtype: of the text encoder. Raises WeightsError for a folder that has none, or whose network
    reads what vdx.prepare does not make.
    """
    has_index = (path / INDEX).is_file()
    if not has_index or read_json_object(path / INDEX).get("_class_name") in PIPELINES:
        return _open_wan(path, dtype)
    return _open_image_model(path, dtype)


def _open_wan(path: Path, dtype: str) -> EncoderModel:
    """Open a Wan."""
    model = open_pretrained(path, dtype)
    if model.reads_control:
        raise WeightsError(f"{path} reads a control video (VACE), which vdx.prepare does not make.")
    if model.signals.get("image_tokens", {}).get("positions"):
        raise WeightsError(
            f"{path} reads a first and a last image, and vdx.prepare encodes first ones alone."
        )
    names = ["vae", "text_encoder"]
    if "image_tokens" in model.signals:
        names.append("image_encoder")
    return EncoderModel(
        path=path,
        components={name: model.components[name] for name in names},
        rate=model.components["vae"].module.rates.frames,
        unit=size_unit(model),
        lengths=(64, 128, 256, LONGEST_WAN),
        is_padded=False,
        longest=model.signals["embeddings"].get("length") or LONGEST_WAN,
        has_concat="concat" in model.signals,
    )


def _open_image_model(path: Path, dtype: str) -> EncoderModel:
    """Open a folder with an image VAE."""
    missing = [name for name in ("vae", "text_encoder", "tokenizer") if not (path / name).is_dir()]
    if missing:
        raise WeightsError(listed(f"{path} lacks folders that encode clips and captions:", missing))
    names = ["vae", "text_encoder"]
    if (path / "image_encoder").is_dir():
        names.append("image_encoder")
    components = {name: open_component(name, path / name, dtype) for name in names}
    vae = components["vae"].module
    if not isinstance(vae, ImageVAE):
        raise WeightsError(f"{path}: its VAE is none of a known pipeline's.")

    text = components["text_encoder"].module
    is_clip = isinstance(text, CLIPTextModel)
    lengths = (text.positions,) if isinstance(text, CLIPTextModel) else LENGTHS_T5
    return EncoderModel(
        path=path,
        components=components,
        rate=1,
        unit=2 ** len(vae.block_out_channels),  # of the VAE, and patches of 2 x 2 latent pixels
        lengths=lengths,
        is_padded=is_clip,
        longest=lengths[-1],
    )
