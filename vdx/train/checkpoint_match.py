"""Checks that a checkpoint fits a config: its arrays and its frozen weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vdx.parallel import path_str
from vdx.train.checksum import Leaf

__all__ = ["CheckpointError", "check_base", "check_same", "shorten"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is missing, or belongs to another model."""


def check_same(abstract: Any, leaves: Mapping[str, Leaf], where: Path) -> None:
    """Raise CheckpointError that lists every array that differs from a checkpoint's.

    Orbax would leave a missing array out, and pad or convert one of another shape or dtype.
    """
    wanted = {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    saved = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] in abstract}

    # Arrays that only one side has
    problems = []
    for path, leaf in wanted.items():
        if path not in saved:
            problems.append(f"{path} {tuple(leaf.shape)}: not in the checkpoint")
    for path, (shape, *_) in saved.items():
        if path not in wanted:
            problems.append(f"{path} {tuple(shape)}: not in this model")

    # Arrays that differ
    for path, leaf in wanted.items():
        if path not in saved:
            continue
        shape, dtype, _ = saved[path]
        if (list(leaf.shape), str(leaf.dtype)) != (list(shape), dtype):
            ours = f"{leaf.dtype}{tuple(leaf.shape)}"
            problems.append(f"{path} {dtype}{tuple(shape)}: this model has {ours}")

    if problems:
        raise CheckpointError(
            f"{where} belongs to another model or optimizer than this config's:\n  "
            + shorten(problems, most=20, separator="\n  ")
            + "\nSet the config that it was trained with, or start in another workdir."
        )


def check_base(progress: Mapping[str, Any], base: str | None, where: str) -> None:
    """Raise CheckpointError if a step was trained with other frozen weights.

    `base` is the digest of the weights that the config names; None: nothing is frozen.
    """
    if progress.get("weights") != base:
        raise CheckpointError(
            f"The parameters of {where} were trained with other frozen weights than those that "
            "config.weights names now (or in another type: config.model.backbone.dtype). Name "
            "the weights that they were trained with."
        )


def shorten(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Join the first names, and counts the rest."""
    first = list(names[:most])
    if len(names) > most:
        first.append(f"and {len(names) - most} more")
    return separator.join(first)
