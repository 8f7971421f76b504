"""BERT (Devlin et al. 2018) as MiniLM uses it, and its pretrained weights."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vdx.models.attention.layers import SelfAttention
from vdx.models.layers import MLP, LayerNorm
from vdx.types import Array, Bool, Float, Int, Params

POSITIONS = 512  # tokens of a text, at most


class Bert(nn.Module):
    """A post-norm text transformer. The defaults are MiniLM's."""

    width: int = 384  # d
    depth: int = 6  # layers
    heads: int = 12
    vocabulary: int = 30522

    @nn.compact
    def __call__(self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"]) -> Float[Array, "b l d"]:
        """Return the last hidden state; `mask` is True on real tokens."""
        # Embed words, positions and the segment: a text is one sentence, all in segment 0.
        positions = jnp.arange(ids.shape[1])[None]
        x = nn.Embed(self.vocabulary, self.width, name="words")(ids)
        x += nn.Embed(POSITIONS, self.width, name="positions")(positions)
        x += nn.Embed(2, self.width, name="segments")(jnp.zeros_like(ids))
        x = self._norm("norm")(x)

        for i in range(self.depth):
            attention = SelfAttention(self.heads, name=f"attention_{i}")
            x = self._norm(f"norm_a{i}")(x + attention(x, mask))
            mlp = MLP(4 * self.width, "gelu_exact", name=f"mlp_{i}")
            x = self._norm(f"norm_b{i}")(x + mlp(x))
        return x

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(1e-12, name=name)


class KeyRule(NamedTuple):
    """Where the arrays of one kind of torch layer go."""

    pattern: str  # regex over the source's layer
    path: str | None  # of our layer; None: not used here
    leaves: Mapping[str, str]  # torch's name of an array -> ours


# Leaves of torch's layers -> ours. Dense kernels are transposed.
EMBED = {"weight": "embedding"}
NORM = {"weight": "scale", "bias": "bias"}
DENSE = {"weight": "kernel", "bias": "bias"}
LAYER = r"encoder\.layer\.(\d+)\."
KEYS: tuple[KeyRule, ...] = (
    KeyRule(r"embeddings\.word_embeddings", "words", EMBED),
    KeyRule(r"embeddings\.position_embeddings", "positions", EMBED),
    KeyRule(r"embeddings\.token_type_embeddings", "segments", EMBED),
    KeyRule(r"embeddings\.LayerNorm", "norm", NORM),
    KeyRule(LAYER + r"attention\.self\.([qkv])(?:uery|ey|alue)", r"attention_\1/\2", DENSE),
    KeyRule(LAYER + r"attention\.output\.dense", r"attention_\1/out", DENSE),
    KeyRule(LAYER + r"attention\.output\.LayerNorm", r"norm_a\1", NORM),
    KeyRule(LAYER + r"intermediate\.dense", r"mlp_\1/up", DENSE),
    KeyRule(LAYER + r"output\.dense", r"mlp_\1/down", DENSE),
    KeyRule(LAYER + r"output\.LayerNorm", r"norm_b\1", NORM),
    KeyRule(r"pooler\.dense", None, {}),
    KeyRule(r"embeddings", None, {}),  # the buffer position_ids: 0, 1, 2, ...
)


def _path(key: str, rules: tuple[KeyRule, ...]) -> str | None:
    """Return our path for a source key, None if it is not used.

    Raises KeyError without a rule.
    """
    layer, _, leaf = key.rpartition(".")
    for rule in rules:
        match = re.fullmatch(rule.pattern, layer)
        if match is None:
            continue
        if rule.path is None:
            return None
        return f"{match.expand(rule.path)}/{rule.leaves[leaf]}"
    raise KeyError(key)


def import_weights(
    source: Mapping[str, np.ndarray],
    abstract_params: Params,
    rules: tuple[KeyRule, ...] = KEYS,
) -> Params:
    """Return float32 parameters, shaped as `abstract_params`, from torch's state dict.

    Raises ValueError that lists every key without a place, every place filled twice or not at
    all, and every shape that differs.
    """
    expected = flatten_dict(abstract_params, sep="/")
    params: dict[str, Any] = {}
    problems = []
    for key, value in source.items():
        # Find the place.
        try:
            path = _path(key, rules)
        except KeyError:
            problems.append(f"{key}: has no place in the network")
            continue
        if path is None:
            continue

        # torch's kernels are [out in].
        if path.endswith("/kernel"):
            value = value.T
        if path not in expected:
            problems.append(f"{key}: its place {path} does not exist")
        elif path in params:
            problems.append(f"{key}: its place {path} was already filled")
        elif value.shape != expected[path].shape:
            problems.append(f"{key}: {value.shape}, expected {expected[path].shape}")
        params[path] = np.asarray(value, np.float32)

    problems += [f"{path}: nothing fills it" for path in expected if path not in params]
    if problems:
        raise ValueError("Weights that do not fit:\n  " + "\n  ".join(problems))
    return unflatten_dict(params, sep="/")
