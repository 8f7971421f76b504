"""The safetensors format: a JSON header that says where each array lies, then the arrays.

Written here and not by its library because arrays are read one at a time, from a memory map, and
written one at a time, so that a file may be larger than the host's memory.
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

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
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


def read_header(path: str | Path) -> dict[str, StoredArray]:
    """Where the arrays of a file lie; reads nothing but the header.

    Raises WeightsError for a file that is not of this format or is cut off.
    """
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """As `read_header`, and what the writer of the file noted in it."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if size < 8 or start - 8 > LARGEST_HEADER:
            raise WeightsError(
                f"{path} is not a safetensors file: it does not begin with the length of a header."
            )
        text = f.read(start - 8)
    try:
        header = {} if len(text) < start - 8 else json.loads(text)
        notes = dict(header.pop("__metadata__", None) or {})
        arrays = {key: _stored(path, start, **entry) for key, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not a safetensors file: its header cannot be read ({error})."
        ) from error
    end = max((a.offset + a.extent() * a.dtype.itemsize for a in arrays.values()), default=start)
    if len(text) < start - 8 or size < end:
        raise WeightsError(
            f"{path} is cut off: it has {size:,} bytes, and its header says "
            f"{max(start, end):,}. Download it again."
        )
    return arrays, notes


def _stored(
    path: Path, start: int, dtype: str, shape: list[int], data_offsets: list[int]
) -> StoredArray:
    first, last = data_offsets
    out = StoredArray(path, DTYPES[dtype], tuple(shape), start + first)
    if (
        first < 0
        or min(shape, default=0) < 0
        or last - first != math.prod(shape) * out.dtype.itemsize
    ):
        raise ValueError(f"{dtype} {shape} does not fill bytes {first} to {last}")
    return out


def write(
    path: str | Path,
    plan: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
    """A file of the arrays that `plan` announces as key -> (shape, dtype), which come one by one
    and in any order. The file is whole or not there."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Large entries first, so that every array begins at a multiple of its entries' size.
    for key, (shape, dtype) in sorted(plan.items(), key=lambda item: -item[1][1].itemsize):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as part, part.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
        for key, value in arrays:
            entry, (shape, dtype) = header.pop(key), plan[key]
            assert value.shape == tuple(shape) and value.dtype == dtype, key
            f.seek(8 + len(text) + entry["data_offsets"][0])
            f.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        assert header.keys() == {"__metadata__"}, header.keys()
