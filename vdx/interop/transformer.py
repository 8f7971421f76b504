"""Pretrained transformers, from any of the families that vdx reads."""

from pathlib import Path

from jax.sharding import Mesh

from vdx.interop.keymap import WeightsError
from vdx.interop.latte import is_latte, load_latte
from vdx.interop.wan import load_wan
from vdx.models.denoiser import Denoiser
from vdx.types import Params


def load_transformer(
    path: str | Path,
    model: Denoiser,
    mesh: Mesh,
    dtype: str = "float32",
    trained: str | None = None,
) -> Params:
    """Return the parameters of `model` from the weights of a Latte or Wan transformer.

    See `load_latte` and `vdx.interop.wan.load_wan`.
    """
    if not isinstance(path, str | Path):
        raise WeightsError(f"{path}: give one file or folder; a transformer has no other parts.")
    load = load_latte if is_latte(path) else load_wan
    return load(path, model, mesh, dtype, trained)
