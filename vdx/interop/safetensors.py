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

from vdx.files import atomic_write
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
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit

# key -> (shape, dtype) of the arrays of a file that is to be written.
Plan = Mapping[str, tuple[tuple[int, ...], np.dtype]]


class Contents(NamedTuple):
    """The header of a file."""

    arrays: dict[str, StoredArray]
    metadata: dict[str, str]  # text that the writer of the file added


def read_header(path: str | Path) -> dict[str, StoredArray]:
    """Return the arrays of a file by key. Reads the header only.

    Raises WeightsError for a file that is not of this format or is cut off.
    """
    return read_file(path).arrays


def read_file(path: str | Path) -> Contents:
    """Return the arrays and the metadata of a file. Reads the header only.

    Raises WeightsError for a file that is not of this format or is cut off.
    """
    path = Path(path)
    size = path.stat().st_size

    # The header.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > LARGEST_HEADER:
            raise WeightsError(
                f"{path} is not a safetensors file: it does not begin with the length of a header."
            )
        text = file.read(length)

    # Its entries.
    start = LENGTH_BYTES + length  # of the first array
    header_complete = len(text) == length
    try:
        header = json.loads(text) if header_complete else {}
        metadata = dict(header.pop("__metadata__", None) or {})
        arrays = {key: _stored(path, start, **entry) for key, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not a safetensors file: its header cannot be read ({error})."
        ) from error

    # Does the file have all the bytes of its arrays?
    end = max((array.offset + array.num_bytes for array in arrays.values()), default=start)
    if not header_complete or size < end:
        raise WeightsError(
            f"{path} is cut off: it has {size:,} bytes, and its header requires "
            f"{max(start, end):,}. Download it again."
        )
    return Contents(arrays, metadata)


def _stored(
    path: Path, start: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> StoredArray:
    """Return the array of one entry of a header.

    Raises ValueError if the sizes in the entry disagree.
    """
    first, last = data_offsets
    array = StoredArray(path, DTYPES[dtype], tuple(shape), start + first)
    fills = last - first == math.prod(shape) * array.dtype.itemsize
    if first < 0 or min(shape, default=0) < 0 or not fills:
        raise ValueError(f"{dtype} {shape} does not fill bytes {first} to {last}")
    return array


def write(path: str | Path, plan: Plan, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a file, one array at a time; the file is complete or absent.

    `arrays` gives each array of `plan` once, with its key, in any order.
    """
    header, num_bytes = _new_header(plan)
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


def _new_header(plan: Plan) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the header of a file, and the bytes of its arrays."""
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Types with large entries first, so that every array begins at a multiple of its entries' size.
    for key, (shape, dtype) in sorted(plan.items(), key=lambda item: -item[1][1].itemsize):
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    return header, end
