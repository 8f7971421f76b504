"""Tables between keys of pretrained weights and our parameters, read both ways.

A row is `Row("blocks.{i}.attn1.to_q.weight", "layers/block_0/full/q/kernel[{i}]", LINEAR)`. Names
in braces stand for numbers and appear on both sides. `[{i}]` is an index along the first axis of a
stacked parameter, as `nn.scan` over layers stores them. Every key of a file must be consumed once
and every parameter filled once; otherwise one error lists everything that is wrong.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vdx.types import Params

__all__ = [
    "CONV",
    "KEEP",
    "LINEAR",
    "Layout",
    "Row",
    "Slot",
    "WeightsError",
    "assign",
    "export",
    "flat",
    "gather",
    "key_finder",
    "listed",
    "patches",
    "slot_finder",
    "slot_shape",
    "zero_paths",
]

DO_NOT_FIT = "These weights do not fit this model:"


class WeightsError(ValueError):
    """Weights of another model; the message lists every key that disagrees."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layouts of one array in the file and in our parameters.

    `ours(theirs(x))` is x. Neither makes a copy.
    """

    ours: Callable[[np.ndarray], np.ndarray]  # the file's array -> our parameter
    theirs: Callable[[np.ndarray], np.ndarray]  # our parameter -> the file's array


KEEP = Layout(lambda x: x, lambda x: x)
LINEAR = Layout(np.transpose, np.transpose)  # torch [out in] -> [in out]
CONV = Layout(
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),  # torch [out in *k] -> [*k in out]
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)


def patches(patch: Sequence[int]) -> Layout:
    """Return the layout of a convolution over patches, whose stride is its size.

    torch [out in *patch] -> [(*patch in) out], the kernel of a dense layer over flattened patches.
    """
    return Layout(
        lambda x: CONV.ours(x).reshape(-1, len(x)),
        lambda x: CONV.theirs(x.reshape(*patch, -1, x.shape[-1])),
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A key of the file, our parameter, and the layout between them."""

    source: str  # "": the file has no such parameter, and ours is zero
    path: str | None  # None: the key is not used
    layout: Layout = KEEP


@dataclasses.dataclass(frozen=True)
class Slot:
    """The part of our parameters that one key of a file fills."""

    path: str  # of the parameter
    index: int | None  # along its first axis if it is stacked, else None
    layout: Layout

    @property
    def name(self) -> str:
        """The path and the index, such as "layers/q/kernel[3]"."""
        return self.path if self.index is None else f"{self.path}[{self.index}]"


class Match(NamedTuple):
    """The row that a name matches, and the numbers in the name."""

    row: Row
    numbers: dict[str, str]  # by the names in the braces of the row


def _pattern(template: str) -> re.Pattern[str]:
    """Return a pattern in which {name} matches a number."""
    parts = re.split(r"\{(\w+)\}", template)
    # Every second part is the name in a pair of braces.
    parts[::2] = [re.escape(text) for text in parts[::2]]
    parts[1::2] = [rf"(?P<{name}>\d+)" for name in parts[1::2]]
    return re.compile("".join(parts))


def _row_finder(
    rows: Sequence[Row], template: Callable[[Row], str | None]
) -> Callable[[str], Match | None]:
    """Return find(name) -> the first row whose template matches the name, or None.

    A model of a thousand arrays may have as many rows; rows without numbers are looked up in a
    dictionary.
    """
    # By name, and by pattern, each with its position in the table.
    exact: dict[str, tuple[int, Row]] = {}
    patterns: list[tuple[int, Row, re.Pattern[str]]] = []

    for position, row in enumerate(rows):
        text = template(row)
        if text is None:
            continue
        if "{" in text:
            patterns.append((position, row, _pattern(text)))
        else:
            exact.setdefault(text, (position, row))

    def find(name: str) -> Match | None:
        position, row = exact.get(name, (len(rows), None))
        # A pattern decides if it stands before the exact name.
        for earlier, other, pattern in patterns:
            if earlier < position and (found := pattern.fullmatch(name)):
                return Match(other, found.groupdict())
        return None if row is None else Match(row, {})

    return find


def _source(row: Row) -> str | None:
    return row.source or None


def _slot(match: Match) -> Slot | None:
    """Return the slot of a match, None if its row is not used."""
    if match.row.path is None:
        return None
    name = match.row.path.format(**match.numbers)
    path, _, index = name.removesuffix("]").partition("[")
    if not index:
        return Slot(path, None, match.row.layout)
    return Slot(path, int(index), match.row.layout)


def slot_finder(rows: Sequence[Row]) -> Callable[[str], Slot | None]:
    """Return find(key) -> the slot that a key of a file fills.

    It is None if no row has the key, or if the key is not used.
    """
    find_row = _row_finder(rows, _source)

    def find(key: str) -> Slot | None:
        match = find_row(key)
        if match is None:
            return None
        return _slot(match)

    return find


def key_finder(rows: Sequence[Row]) -> Callable[[str], tuple[str, Layout] | None]:
    """Return find(name of a slot) -> (key, layout) of the first row with it, or None."""
    find_row = _row_finder(rows, lambda row: row.path if row.source else None)

    def find(name: str) -> tuple[str, Layout] | None:
        match = find_row(name)
        if match is None:
            return None
        return match.row.source.format(**match.numbers), match.row.layout

    return find


def zero_paths(paths: Iterable[str], rows: Sequence[Row]) -> list[str]:
    """Return the paths of our parameters that no file has, and which are zero."""
    find = _row_finder(rows, lambda row: None if row.source else row.path)
    return [path for path in paths if find(path)]


def flat(params: Params) -> dict[str, Any]:
    """Return {"a/b/kernel": leaf} of a tree of parameters."""
    return flatten_dict(params, sep="/")


def assign(keys: Iterable[str], abstract: Params, rows: Sequence[Row]) -> dict[str, Slot]:
    """Return the slot of every key that is used; `abstract` is our tree of parameters.

    Raises WeightsError that lists the keys without a row, the parameters that no key or several
    keys fill, and the indices outside a stack.
    """
    find = _row_finder(rows, _source)
    leaves = flat(abstract)
    slots: dict[str, Slot] = {}
    key_of: dict[str, str] = {}  # name of a slot -> the key that fills it
    problems = []

    # Each key: does a row have it, and is its slot in the model and free?
    for key in keys:
        match = find(key)
        if match is None:
            problems.append(f"{key}: no such parameter in this model")
            continue
        slot = _slot(match)
        if slot is None:
            continue
        problem = _misfit(slot, leaves, key_of)
        if problem:
            problems.append(f"{key}: {problem}")
            continue
        slots[key] = slot
        key_of[slot.name] = key

    # Each parameter: is all of it filled, or zero?
    zero = set(zero_paths(leaves, rows))
    for path, leaf in leaves.items():
        if path not in key_of and path not in zero:
            problems += _unfilled(path, leaf.shape, key_of)

    if problems:
        raise WeightsError(listed(DO_NOT_FIT, problems))
    return slots


def _misfit(slot: Slot, leaves: Mapping[str, Any], key_of: Mapping[str, str]) -> str | None:
    """Return why a key cannot fill a slot, or None."""
    if slot.path not in leaves:
        return f"this model has no {slot.path}"
    shape = leaves[slot.path].shape
    if slot.index is not None and slot.index >= shape[0]:
        return f"{slot.path} has {shape[0]} layers"
    if slot.name in key_of:
        return f"{slot.path} is already filled by {key_of[slot.name]}"
    return None


def _unfilled(path: str, shape: tuple[int, ...], key_of: Mapping[str, str]) -> list[str]:
    """List what no key fills of a parameter that no key fills as a whole."""
    num_layers = shape[0] if shape else 1
    layers = range(num_layers)
    missing = [i for i in layers if f"{path}[{i}]" not in key_of]
    if not missing:
        return []
    if len(missing) == len(layers):
        return [f"{path} {shape}: not in the file"]
    return [f"{path}: layers {missing} are not in the file"]


def slot_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a slot of a parameter of this shape."""
    if slot.index is None:
        return shape
    return shape[1:]  # one layer of the stack


def gather(
    read: Callable[[str], np.ndarray], keys: Iterable[str], abstract: Params, rows: Sequence[Row]
) -> Params:
    """Return our parameters as numpy arrays, from read(key) -> array of the file.

    They have the dtypes of `abstract`. Raises WeightsError as `assign` does, and for shapes that
    differ.
    """
    leaves = flat(abstract)
    zero = zero_paths(leaves, rows)
    params = {path: np.zeros(leaves[path].shape, leaves[path].dtype) for path in zero}

    # Every other parameter, whole or one layer of a stack at a time.
    problems = []
    for key, slot in assign(keys, abstract, rows).items():
        leaf = leaves[slot.path]
        value = slot.layout.ours(read(key))
        needed = slot_shape(slot, leaf.shape)
        if value.shape != needed:
            problems.append(f"{key}: is {value.shape} for {slot.path} {needed}")
        elif slot.index is None:
            params[slot.path] = np.asarray(value, leaf.dtype)
        else:
            stack = params.setdefault(slot.path, np.empty(leaf.shape, leaf.dtype))
            stack[slot.index] = value

    if problems:
        raise WeightsError(listed(DO_NOT_FIT, problems))
    return unflatten_dict(params, sep="/")


def export(params: Params, rows: Sequence[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, array) of the file's layout for every parameter, one at a time.

    The first row that leads to a slot names it. Raises WeightsError that lists the parameters
    without a row.
    """
    find = key_finder(rows)
    leaves = flat(params)
    for path in zero_paths(leaves, rows):
        del leaves[path]  # the file has none

    problems = []
    for path, leaf in leaves.items():
        # A stack has a row for each layer and none of its own.
        stacked = find(path) is None and leaf.shape
        for name, value in _layers(path, leaf) if stacked else [(path, leaf)]:
            found = find(name)
            if found is None:
                problems.append(f"{path}: no row of the table")
                break
            key, layout = found
            yield key, layout.theirs(np.asarray(value))

    if problems:
        raise WeightsError(listed("The file's layout has no place for these parameters:", problems))


def _layers(path: str, stack: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of the slots of a stacked parameter, one at a time."""
    for index in range(stack.shape[0]):
        yield f"{path}[{index}]", stack[index]


def listed(head: str, problems: Sequence[str], most: int = 40) -> str:
    """Return a message: its head, and at most `most` problems, one a line."""
    lines = [head, *problems[:most]]
    if len(problems) > most:
        lines.append(f"and {len(problems) - most} more")
    return "\n  ".join(lines)
