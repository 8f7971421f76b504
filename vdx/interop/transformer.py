"""Pretrained transformers, whichever family they are of."""

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
    """As `load_latte` or `vdx.interop.wan.load_wan`, whichever the weights are of."""
    if not isinstance(path, str | Path):
        raise WeightsError(f"{path}: a transformer lies in one file or folder.")
    return (load_latte if is_latte(path) else load_wan)(path, model, mesh, dtype, trained)
