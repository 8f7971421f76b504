"""PyTorch's zip files (`.pth`), read without torch and without running what they contain.

A pickle may name any function of any module, and unpickling calls it. Here only the names that
say "a dictionary" and "a tensor over this storage" exist, as inert stand-ins; any other is an
error. The arrays are then views of a memory map of the file.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vdx.interop.keymap import WeightsError
from vdx.interop.safetensors import Stored

STORAGES = {f"{name}Storage": np.dtype(dtype) for name, dtype in {
    "Double": np.float64, "Float": np.float32, "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16, "Long": np.int64, "Int": np.int32, "Short": np.int16,
    "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_}.items()}


class _Dict(dict):
    """Stands in for OrderedDict, whose attributes (torch sets `_metadata`) may be set."""


def _tensor(storage: Stored, offset: int, shape: tuple[int, ...], strides: tuple[int, ...],
            *_: Any) -> Stored:
    out = Stored(storage.file, storage.dtype, tuple(shape),
                 storage.offset + offset * storage.dtype.itemsize, tuple(strides))
    if min((offset, *shape, *strides), default=0) < 0 or offset + out.extent() > storage.shape[0]:
        raise pickle.UnpicklingError(f"a tensor {out.shape} reaches beyond its storage")
    return out


def _parameter(data: Stored, *_: Any) -> Stored:
    return data


class _Names(pickle.Unpickler):
    """Knows dictionaries and tensors, and no other name."""

    KNOWN: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Dict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        **{("torch", name): dtype for name, dtype in STORAGES.items()}}

    def __init__(self, file, storage):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array "
                                         "needs") from None

    def persistent_load(self, pid: Any) -> Stored:
        kind, dtype, key, _, entries = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"it keeps {kind} outside")
        return self.storage(key, dtype, entries)


def read_pth(path: str | Path) -> dict[str, Stored]:
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

            def storage(key: str, dtype: np.dtype, entries: int) -> Stored:
                info = archive.getinfo(f"{root}data/{key}")
                if info.compress_type or info.file_size < entries * dtype.itemsize:
                    raise pickle.UnpicklingError(f"the storage {key} is not whole")
                return Stored(path, dtype, (entries,), _begins(path, info))

            with archive.open(entry) as f:
                content = _Names(f, storage).load()
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} is not one of PyTorch's zip files, or it is cut off ({error})."
                           " Download it again; files from before torch 1.6 must be saved anew."
                           ) from error
    except Exception as error:      # a broken or hostile pickle can fail in any way
        raise WeightsError(f"{path} is not read as weights: {error}.") from error
    arrays = dict(_arrays(content, ""))
    if not arrays:
        raise WeightsError(f"{path} holds no arrays.")
    return arrays


def _begins(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: after a local header, whose length only it knows."""
    with path.open("rb") as f:
        f.seek(info.header_offset)
        header = f.read(30)
    name, extra = (int.from_bytes(header[i:i + 2], "little") for i in (26, 28))
    return info.header_offset + 30 + name + extra


def _arrays(content: Any, prefix: str):
    if isinstance(content, Stored):
        yield prefix.removesuffix("."), content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _arrays(value, f"{prefix}{key}.")
