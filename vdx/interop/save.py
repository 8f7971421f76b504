"""Parameters back into files of weights."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdx.files import write_json
from vdx.interop.keymap import Row, WeightsError, export
from vdx.interop.safetensors import write
from vdx.types import Params


def save_folder(
    params: Params,
    rows: Sequence[Row],
    config: Mapping[str, Any],
    path: str | Path,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A folder in the layout of diffusers: `config.json` and the weights, in parts of at most
    `max_shard_bytes` (or of one array) with an index if they are larger than that.

    Raises WeightsError for a folder that is not empty and for parameters without a row.
    """
    empty_folder(path)
    write_parts(
        path,
        "diffusion_pytorch_model",
        export_plan(params, rows),
        export(params, rows),
        max_shard_bytes,
    )
    write_json(Path(path) / "config.json", config)


def empty_folder(path: str | Path) -> None:
    """Raises WeightsError for a folder that is not empty."""
    if Path(path).exists() and any(Path(path).iterdir()):
        raise WeightsError(f"{path} is not empty. Name a new folder, so that no old part stays.")


def write_parts(
    path: str | Path,
    stem: str,
    plan: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """`stem`.safetensors in a folder, or parts of it with an index; the arrays come one by one,
    in the order of the plan (key -> shape, dtype)."""
    path, arrays = Path(path), iter(arrays)
    parts: list[dict] = [{}]
    size = total = 0
    for key, (shape, dtype) in plan.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if parts[-1] and size + bytes_ > max_shard_bytes:
            parts.append({})
            size = 0
        parts[-1][key] = shape, dtype
        size, total = size + bytes_, total + bytes_
    names = (
        [f"{stem}.safetensors"]
        if len(parts) == 1
        else [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    )
    for name, part in zip(names, parts, strict=True):
        write(path / name, part, itertools.islice(arrays, len(part)))
    if len(parts) > 1:
        write_json(
            path / f"{stem}.safetensors.index.json",
            {
                "metadata": {"total_size": total},
                "weight_map": {
                    key: name for name, part in zip(names, parts, strict=True) for key in part
                },
            },
        )


def export_plan(params: Params, rows: Sequence[Row]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """key -> (shape, dtype) of what `export` gives, in its order, without an array."""
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), params)
    return {key: (value.shape, value.dtype) for key, value in export(empty, rows)}
