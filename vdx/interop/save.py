"""Parameters into files of weights, one array at a time."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vdx.files import write_json
from vdx.interop.keymap import Row, WeightsError, export
from vdx.interop.safetensors import Plan, write
from vdx.types import Params

MAX_SHARD_BYTES = 5_000_000_000  # of one file


def save_folder(
    params: Params,
    rows: Sequence[Row],
    config: Mapping[str, Any],
    path: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder in the layout of diffusers: `config.json` and the weights.

    Raises WeightsError for a folder that is not empty, and for parameters without a row.
    """
    empty_folder(path)
    plan = export_plan(params, rows)
    arrays = export(params, rows)
    write_shards(path, "diffusion_pytorch_model", plan, arrays, max_shard_bytes)
    write_json(Path(path) / "config.json", config)


def empty_folder(path: str | Path) -> None:
    """Raise WeightsError for a folder that is not empty."""
    if Path(path).exists() and any(Path(path).iterdir()):
        raise WeightsError(
            f"{path} is not empty. Name a new folder, so that no file of another model stays."
        )


def write_shards(
    path: str | Path,
    stem: str,
    plan: Plan,
    arrays: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `stem`.safetensors in a folder, or shards of it with an index.

    A shard has at most `max_shard_bytes`, or one array that is larger. The arrays arrive one at a
    time, in the order of the plan (key -> shape, dtype).
    """
    path = Path(path)
    arrays = iter(arrays)
    shards = _split(plan, max_shard_bytes)

    # One file needs no index.
    if len(shards) == 1:
        write(path / f"{stem}.safetensors", plan, arrays)
        return

    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write(path / name, shard, itertools.islice(arrays, len(shard)))
        file_of |= dict.fromkeys(shard, name)

    # The index is last: without it the shards are no model.
    total = sum(_num_bytes(*facts) for facts in plan.values())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    write_json(path / f"{stem}.safetensors.index.json", index)


def _split(plan: Plan, max_shard_bytes: int) -> list[Plan]:
    """Split a plan, in its order, into shards that are not too large."""
    shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
    size = 0
    for key, facts in plan.items():
        num_bytes = _num_bytes(*facts)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = facts
        size += num_bytes
    return list(shards)


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def export_plan(params: Params, rows: Sequence[Row]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the shapes and dtypes of what `export` yields, by key and in its order.

    `params` may be abstract; no array is made.
    """
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), params)
    return {key: (value.shape, value.dtype) for key, value in export(empty, rows)}
