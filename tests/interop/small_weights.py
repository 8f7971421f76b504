"""Weights of a small model, in a file's layout and as abstract parameters of ours."""

import jax
import jax.numpy as jnp
import numpy as np

from vdx.interop.keymap import CONV, LINEAR, Row
from vdx.interop.safetensors import write
from vdx.interop.wan_keys import halves

RNG = np.random.default_rng(0)
LAYERS = 4
ROWS = (
    Row("blocks.{i}.q.weight", "layers/q/kernel[{i}]", halves(2)),
    Row("blocks.{i}.up.weight", "layers/up/kernel[{i}]", LINEAR),
    Row("blocks.{i}.up.bias", "layers/up/bias[{i}]"),
    Row("conv.weight", "conv/kernel", CONV),
    Row("norm.weight", "norm/scale"),
    Row("", "text/null"),
)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


THEIRS = {
    **{f"blocks.{i}.q.weight": normal(8, 8) for i in range(LAYERS)},
    **{f"blocks.{i}.up.weight": normal(16, 8) for i in range(LAYERS)},
    **{f"blocks.{i}.up.bias": normal(16) for i in range(LAYERS)},
    "conv.weight": normal(4, 8, 3, 3),
    "norm.weight": normal(8),
}
SHAPES = {
    "layers": {
        "q": {"kernel": (LAYERS, 8, 8)},
        "up": {"kernel": (LAYERS, 8, 16), "bias": (LAYERS, 16)},
    },
    "conv": {"kernel": (3, 3, 8, 4)},
    "norm": {"scale": (8,)},
    "text": {"null": (6,)},
}
ABSTRACT = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple)
)


def save(path, arrays):
    """Write {key: array} to a safetensors file; return its path."""
    write(path, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.items())
    return path
