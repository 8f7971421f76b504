"""Public weights and ours, key by key: tables of rows that are read in both directions.

A row says `Row("blocks.{i}.attn1.to_q.weight", "layers/block_0/full/q/kernel[{i}]", LINEAR)`.
Names in braces stand for numbers and appear on both sides; `[{i}]` is a place along the first
axis of a stacked parameter, as `nn.scan` over layers keeps them. Every key of a file must be
consumed once and every parameter filled once, or one error lists all that is wrong.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vdx.types import Params

__all__ = [
    "CONV",
    "KEEP",
    "LINEAR",
    "Layout",
    "Place",
    "Row",
    "WeightsError",
    "assign",
    "export",
    "gather",
    "naming",
    "patches",
    "place_of",
]


class WeightsError(ValueError):
    """Weights that are not those of this model; the message lists every key that disagrees."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array is laid out there and here: `ours(theirs(x)) == x`, without a copy."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


KEEP = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(np.transpose, np.transpose)  # torch [out in] -> [in out]
CONV = Layout(
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),  # torch [out in *k] -> [*k in out]
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)


def patches(patch: Sequence[int]) -> Layout:
    """A convolution whose stride is its size, torch [out in *patch], as our dense layer over
    flattened patches [(*patch in) out]."""
    return Layout(
        lambda x: CONV.ours(x).reshape(-1, len(x)),
        lambda x: CONV.theirs(x.reshape(*patch, -1, x.shape[-1])),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """source: a key of the file, "" where the file has no such parameter and ours is zero.
    path: of our parameter, None where the key is not used."""

    source: str
    path: str | None
    layout: Layout = KEEP


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a key of a file goes: a parameter's path, and the index in it if it is stacked."""

    path: str
    index: int | None
    layout: Layout

    @property
    def slot(self) -> str:
        return self.path if self.index is None else f"{self.path}[{self.index}]"


def _pattern(template: str) -> re.Pattern:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(f"(?P<{p}>\\d+)" if i % 2 else re.escape(p) for i, p in enumerate(parts))
    )


def _finder(rows: Sequence[Row], template: Callable[[Row], str | None]):
    """find(name) -> (row, numbers) of the first row whose template says this name, or None.

    A model of a thousand arrays may have as many rows; those without numbers are looked up.
    """
    exact: dict[str, tuple[int, Row]] = {}
    patterns: list[tuple[int, Row, re.Pattern]] = []
    for place, row in enumerate(rows):
        if (text := template(row)) is None:
            continue
        if "{" in text:
            patterns.append((place, row, _pattern(text)))
        else:
            exact.setdefault(text, (place, row))

    def find(name: str) -> tuple[Row, dict[str, str]] | None:
        place, row = exact.get(name, (len(rows), None))
        for earlier, other, pattern in patterns:
            if earlier < place and (match := pattern.fullmatch(name)):
                return other, match.groupdict()
        return None if row is None else (row, {})

    return find


def _place(path: str, layout: Layout) -> Place:
    name, _, index = path.removesuffix("]").partition("[")
    return Place(name, int(index) if index else None, layout)


def place_of(rows: Sequence[Row]) -> Callable[[str], Place | None]:
    """find(key) -> where a key of a file goes; None if no row names it, or it is not used."""
    find = _finder(rows, lambda row: row.source or None)

    def place(key: str) -> Place | None:
        row, numbers = find(key) or (None, {})
        return _place(row.path.format(**numbers), row.layout) if row and row.path else None

    return place


def flat(params: Params) -> dict[str, Any]:
    """{"a/b/kernel": leaf} of a tree of parameters."""
    return flatten_dict(params, sep="/")


def assign(keys: Iterable[str], like: Params, rows: Sequence[Row]) -> dict[str, Place]:
    """key -> Place for every key that is used; `like` is our (abstract) tree of parameters.

    Raises WeightsError that lists keys without a row, parameters filled by no key or by
    several, and places outside a stack.
    """
    find = _finder(rows, lambda row: row.source or None)
    leaves, found, problems = flat(like), {}, []
    filled: dict[tuple[str, int | None], str] = {}
    for key in keys:
        if (known := find(key)) is None:
            problems.append(f"{key}: no such parameter in this model")
            continue
        row, numbers = known
        if row.path is None:
            continue
        place = _place(row.path.format(**numbers), row.layout)
        slot = place.path, place.index
        if place.path not in leaves:
            problems.append(f"{key}: this model has no {place.path}")
        elif place.index is not None and place.index >= leaves[place.path].shape[0]:
            problems.append(f"{key}: {place.path} has {leaves[place.path].shape[0]} layers")
        elif slot in filled:
            problems.append(f"{key}: {place.path} is already filled by {filled[slot]}")
        else:
            found[key], filled[slot] = place, key
    whole = {path for path, index in filled if index is None} | set(absent(leaves, rows))
    for path, leaf in leaves.items():
        holes = (
            []
            if path in whole
            else [i for i in range(leaf.shape[0]) if (path, i) not in filled]
            if leaf.shape
            else [0]
        )
        if holes and (path, 0) not in filled and len(holes) == (leaf.shape or (1,))[0]:
            problems.append(f"{path} {leaf.shape}: not in the file")
        elif holes:
            problems.append(f"{path}: layers {holes} are not in the file")
    if problems:
        raise WeightsError(listed("These weights do not fit this model:", problems))
    return found


def absent(leaves: Iterable[str], rows: Sequence[Row]) -> list[str]:
    """Paths of our parameters that the file does not have, and which are zero."""
    find = _finder(rows, lambda row: None if row.source else row.path)
    return [path for path in leaves if find(path)]


def gather(
    read: Callable[[str], np.ndarray], keys: Iterable[str], like: Params, rows: Sequence[Row]
) -> Params:
    """Our parameters (numpy, of the dtypes of `like`) from `read(key) -> array`.

    Raises WeightsError as `assign` does, and for shapes that differ.
    """
    leaves = flat(like)
    out = {path: np.zeros(leaves[path].shape, leaves[path].dtype) for path in absent(leaves, rows)}
    problems = []
    for key, place in assign(keys, like, rows).items():
        leaf, value = leaves[place.path], place.layout.ours(read(key))
        shape = leaf.shape if place.index is None else leaf.shape[1:]
        if value.shape != shape:
            problems.append(f"{key}: is {value.shape} for {place.path} {shape}")
        elif place.index is None:
            out[place.path] = np.asarray(value, leaf.dtype)
        else:
            out.setdefault(place.path, np.empty(leaf.shape, leaf.dtype))[place.index] = value
    if problems:
        raise WeightsError(listed("These weights do not fit this model:", problems))
    return unflatten_dict(out, sep="/")


def export(params: Params, rows: Sequence[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """(key, array) of the file's layout for every parameter, one at a time.

    The first row that leads to a place names it. Raises WeightsError that lists parameters
    without a row.
    """
    find = naming(rows)
    leaves, problems = flat(params), []
    for path in absent(leaves, rows):
        del leaves[path]
    for path, leaf in leaves.items():
        stacked = find(path) is None and leaf.shape
        slots = [f"{path}[{i}]" for i in range(leaf.shape[0])] if stacked else [path]
        for index, slot in enumerate(slots):
            if (known := find(slot)) is None:
                problems.append(f"{path}: no row of the table")
                break
            key, layout = known
            yield key, layout.theirs(np.asarray(leaf[index] if stacked else leaf))
    if problems:
        raise WeightsError(listed("Parameters that this layout cannot say:", problems))


def naming(rows: Sequence[Row]) -> Callable[[str], tuple[str, Layout] | None]:
    """name(slot) -> (key, layout) of the first row that leads to a place such as "layers/q[3]"."""
    find = _finder(rows, lambda row: row.path if row.source else None)

    def name(slot: str) -> tuple[str, Layout] | None:
        if (known := find(slot)) is None:
            return None
        row, numbers = known
        return row.source.format(**numbers), row.layout

    return name


def listed(head: str, problems: Sequence[str], most: int = 40) -> str:
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([head, *problems[:most], *more])
