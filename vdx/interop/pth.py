"""PyTorch's zip files (`.pth`), read without torch and without running what they contain.

A pickle may name any function of any module, and unpickling calls it. Here only the names that
say "a dictionary" and "a tensor over this storage" exist, as inert stand-ins; any other is an
error. What they say is checked after the pickle has ended, and the arrays are views of a memory
map of the file.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vdx.interop.keymap import WeightsError
from vdx.interop.stored_array import StoredArray

STORAGES = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}


class _Dict(dict):
    """Stands in for OrderedDict, which torch gives an attribute `_metadata`."""


class _Storage(NamedTuple):
    kind: str
    dtype: Any
    key: str
    device: str
    entries: int


class _Tensor(NamedTuple):
    storage: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Names(pickle.Unpickler):
    """Knows dictionaries and tensors, and no other name."""

    KNOWN: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *fields: _Tensor(*fields[:4]),
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return self.KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(*pid)


def read_pth(path: str | Path) -> dict[str, StoredArray]:
    """Where the arrays of a state dict lie, by "a.b.c" if dictionaries are nested.

    Raises WeightsError for a file that is not torch's zip format, is cut off, or contains
    anything but dictionaries of arrays and plain values.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((i for i in archive.infolist() if i.filename.endswith("/data.pkl")), None)
            if entry is None:
                raise zipfile.BadZipFile("no data.pkl inside")
            root = entry.filename.removesuffix("data.pkl")
            with archive.open(entry) as f:
                tensors = dict(_tensors(_Names(f).load(), ""))
            arrays = {key: _stored(path, archive, root, t) for key, t in tensors.items()}
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{path} is not one of PyTorch's zip files, or it is cut off ({error})."
            " Download it again; files from before torch 1.6 must be saved anew."
        ) from error
    except Exception as error:  # a broken or hostile pickle can fail in any way
        raise WeightsError(f"{path} is not read as weights: {error}.") from error
    if not arrays:
        raise WeightsError(f"{path} holds no arrays.")
    return arrays


def _tensors(content: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(content, _Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, dict):
        for key, value in dict.items(content):
            yield from _tensors(value, f"{prefix}{key}.")


def _stored(path: Path, archive: zipfile.ZipFile, root: str, tensor: _Tensor) -> StoredArray:
    """Where a tensor lies; raises ValueError for one that is not within its storage."""
    storage, offset = tensor.storage, int(tensor.offset)
    shape, strides = tuple(map(int, tensor.shape)), tuple(map(int, tensor.strides))
    if not isinstance(storage, _Storage) or storage.dtype not in STORAGES.values():
        raise ValueError("a tensor lies over no storage")
    info, size = archive.getinfo(f"{root}data/{storage.key}"), storage.dtype.itemsize
    out = StoredArray(path, storage.dtype, shape, _begins(path, info) + offset * size, strides)
    if (
        info.compress_type
        or min((offset, *shape, *strides)) < 0
        or (offset + out.extent()) * size > info.file_size
    ):
        raise ValueError(f"a tensor {shape} reaches beyond its storage")
    return out


def _begins(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after a local header, whose length only it knows."""
    with path.open("rb") as f:
        f.seek(info.header_offset)
        header = f.read(30)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return info.header_offset + 30 + name + extra
