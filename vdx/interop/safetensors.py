"""The safetensors format: a JSON header with the positions of arrays, then these.

vdx has its own reader and writer because arrays are read one at a time, through a memory map, and
written one at a time. A file may therefore be larger than the host's memory.
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vdx.files import (
    MOST_JSON_BYTES,
    array_bytes,
    atomic_write,
    check_regular_file,
    excerpt,
    open_regular,
    parse_json,
)
from vdx.interop.keymap import WeightsError
from vdx.interop.stored_array import StoredArray

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8  # a file begins with the length of its header, an integer of this size
LARGEST_HEADER = MOST_JSON_BYTES  # the format's own limit is three times as much

# key -> (shape, dtype) of the arrays of a file that is to be written.
Plan = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class Contents(NamedTuple):
    """The header of a file."""

    arrays: dict[str, StoredArray]
    metadata: dict[str, str]  # text that the writer of the file added


def read_header(path: str | Path) -> dict[str, StoredArray]:
    """Return the arrays of a file by key. Reads the header only.

    Raises what `read_file` raises.
    """
    return read_file(path).arrays


def read_file(path: str | Path) -> Contents:
    """Return the arrays and the metadata of a file. Reads the header only.

    The arrays of a valid file follow one another without gaps, and end where the file ends.
    Raises WeightsError for a file that is not of this format or is cut off, and FileError for
    no regular file.
    """
    path = Path(path)
    size = check_regular_file(path)

    # The header.
    with open_regular(path) as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > LARGEST_HEADER:
            raise WeightsError(
                f"{path} is not a safetensors file: it does not begin with the length of a header."
            )
        text = file.read(length)
    start = LENGTH_BYTES + length  # of the first array
    if len(text) < length:
        raise _cut_off(path, size, start)

    # Its entries.
    try:
        header = parse_json(text, "its header")
        metadata = _metadata(header)
        arrays = {key: _stored(path, start, key, entry) for key, entry in header.items()}
        end = _check_order(arrays, start)
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error

    # Does the file have all the bytes of its arrays, and no others?
    if size < end:
        raise _cut_off(path, size, end)
    if size > end:
        raise WeightsError(
            f"{path} has {size:,} bytes, {size - end:,} more than its header requires."
        )
    return Contents(arrays, metadata)


def _cut_off(path: Path, size: int, needed: int) -> WeightsError:
    """Return the error for a file that is too short."""
    return WeightsError(
        f"{path} is cut off: it has {size:,} bytes, and its header requires {needed:,}. "
        "Download it again."
    )


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Return the texts in a header, and remove them; raise ValueError for others."""
    if not isinstance(header, dict):
        raise ValueError("its header is no object.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no texts by name.")
    return metadata


def _stored(path: Path, start: int, key: str, entry: dict[str, Any]) -> StoredArray:
    """Return the array of one entry of a header.

    Raises ValueError if the entry is not complete, or its sizes disagree.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{excerpt(key)} has no dtype, shape and data_offsets, or more.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"{excerpt(key)} has the type {excerpt(str(dtype))}, which is not known.")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"{excerpt(key)} has no lists of its sizes and offsets.")
    if len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise ValueError(f"{excerpt(key)} has offsets that are not two integers.")

    first, last = offsets
    num_bytes = array_bytes(shape, DTYPES[dtype].itemsize)
    if first < 0 or last - first != num_bytes:
        raise ValueError(f"{excerpt(key)} of {num_bytes:,} bytes does not fill {first} to {last}.")
    return StoredArray(path, DTYPES[dtype], tuple(shape), start + first)


def _check_order(arrays: Mapping[str, StoredArray], start: int) -> int:
    """Return where the last array ends.

    start: where the first one begins. Raises ValueError for arrays that overlap or leave a gap.
    """
    end = start
    for key, array in sorted(arrays.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if array.offset != end:
            raise ValueError(f"{excerpt(key)} does not begin where the array before it ends.")
        end += array.num_bytes
    return end


def write(
    path: str | Path,
    plan: Plan,
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file, one array at a time; the file is complete or absent.

    `arrays` gives each array of `plan` once, with its key, in any order. metadata: texts for the
    header.
    """
    header, num_bytes = _new_header(plan, metadata or {})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the first array is aligned
    start = LENGTH_BYTES + len(text)

    # The arrays, each in its position.
    missing = set(plan)
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        file.truncate(start + num_bytes)
        for key, value in arrays:
            shape, dtype = plan[key]
            assert value.shape == tuple(shape) and value.dtype == dtype, key
            missing.remove(key)
            file.seek(start + header[key]["data_offsets"][0])
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        assert not missing, missing


def _new_header(plan: Plan, metadata: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the header of a file, and the bytes of its arrays."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    # Types with large entries first, so that every array begins at a multiple of its entries' size.
    for key, (shape, dtype) in sorted(plan.items(), key=lambda item: -item[1][1].itemsize):
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    return header, end
