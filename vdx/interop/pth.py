"""PyTorch's zip files (`.pth`), read without torch and without running their code.

A pickle may name any function of any module, and unpickling calls it. This reader provides only
the names for "a dictionary" and "a tensor over this storage", as inert stand-ins; any other name
is an error. What the stand-ins received is checked after the pickle has ended. The arrays are
views of a memory map of the file.
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
# The local header that precedes an entry of a zip file: its fixed size, and where in it the lengths
# of the name and of the extra field are, two bytes each.
LOCAL_HEADER_BYTES = 30
NAME_LENGTH = slice(26, 28)
EXTRA_LENGTH = slice(28, 30)


class _Dict(dict):
    """Stands in for OrderedDict, which torch gives an attribute `_metadata`."""


class _Storage(NamedTuple):
    kind: str
    dtype: Any  # checked when the pickle has ended
    key: str  # the storage is the entry data/KEY of the zip file
    device: str
    entries: int


class _Tensor(NamedTuple):
    storage: Any  # checked when the pickle has ended
    offset: int  # in entries of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in entries


class _Unpickler(pickle.Unpickler):
    """An unpickler that provides dictionaries and tensors, and no other name."""

    KNOWN: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *fields: _Tensor(*fields[:4]),
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name. Raises UnpicklingError for names that have none."""
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return self.KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that torch refers to by these fields."""
        return _Storage(*pid)


def read_pth(path: str | Path) -> dict[str, StoredArray]:
    """Return the arrays of a state dict, by "a.b.c" if dictionaries are nested.

    Raises WeightsError for a file that is not torch's zip format, is cut off, or contains
    anything but dictionaries of arrays and plain values.
    """
    path = Path(path)
    try:
        arrays = _read(path)
    except zipfile.BadZipFile as error:
        raise WeightsError(
            f"{path} is not one of PyTorch's zip files, or it is cut off ({error})."
            " Download it again; files from before torch 1.6 must be saved anew."
        ) from error
    except Exception as error:  # a broken or hostile pickle can fail in any way
        raise WeightsError(f"{path} cannot be read as weights: {error}.") from error

    if not arrays:
        raise WeightsError(f"{path} holds no arrays.")
    return arrays


def _read(path: Path) -> dict[str, StoredArray]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickled = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
        if pickled is None:
            raise zipfile.BadZipFile("no data.pkl inside")

        with archive.open(pickled) as file:
            tensors = dict(_tensors(_Unpickler(file).load(), prefix=""))
        root = pickled.filename.removesuffix("data.pkl")
        return {key: _stored(path, archive, root, tensor) for key, tensor in tensors.items()}


def _tensors(content: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors of nested dictionaries; other values are skipped."""
    if isinstance(content, _Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, dict):
        # dict.items, because the pickle may have set an attribute `items` of a stand-in.
        for key, value in dict.items(content):
            yield from _tensors(value, f"{prefix}{key}.")


def _stored(path: Path, archive: zipfile.ZipFile, root: str, tensor: _Tensor) -> StoredArray:
    """Return a tensor's position.

    Raises ValueError for a tensor that is not inside its storage.
    """
    storage = tensor.storage
    if not isinstance(storage, _Storage) or storage.dtype not in STORAGES.values():
        raise ValueError("a tensor has no storage")

    offset = int(tensor.offset)
    shape = tuple(map(int, tensor.shape))
    strides = tuple(map(int, tensor.strides))
    itemsize = storage.dtype.itemsize

    # Where its storage is in the file.
    entry = archive.getinfo(f"{root}data/{storage.key}")
    begin = _first_byte(path, entry) + offset * itemsize
    array = StoredArray(path, storage.dtype, shape, begin, strides)

    # A compressed storage cannot be mapped.
    negative = min((offset, *shape, *strides)) < 0
    end = (offset + array.extent()) * itemsize
    if entry.compress_type or negative or end > entry.file_size:
        raise ValueError(f"a tensor {shape} reaches beyond its storage")
    return array


def _first_byte(path: Path, entry: zipfile.ZipInfo) -> int:
    """Return where the bytes of an entry begin: after its local header.

    The length of that header is written in the header alone; the zip file's directory may have
    another.
    """
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        header = file.read(LOCAL_HEADER_BYTES)
    name = int.from_bytes(header[NAME_LENGTH], "little")
    extra = int.from_bytes(header[EXTRA_LENGTH], "little")
    return entry.header_offset + LOCAL_HEADER_BYTES + name + extra
