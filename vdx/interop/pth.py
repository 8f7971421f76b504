"""PyTorch's zip files (`.pth`), read without torch and without running their code.

`vdx.interop.inert_pickle` reads the pickle as data. Of its calls only "a tensor over this storage"
has a meaning here. A storage is an entry of the zip file, whose position and size must be those
that the pickle and both headers of the entry state. The arrays are views of a memory map of the
file.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vdx.files import array_bytes, excerpt, open_regular
from vdx.interop import inert_pickle
from vdx.interop.inert_pickle import Call, Name, Reference
from vdx.interop.keymap import WeightsError
from vdx.interop.stored_array import StoredArray

STORAGES = {
    Name("torch", f"{name}Storage"): np.dtype(dtype)
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
REBUILD_TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
REBUILD_PARAMETER = Name("torch._utils", "_rebuild_parameter")
NAMES = {Name(*inert_pickle.ORDERED_DICT), REBUILD_TENSOR, REBUILD_PARAMETER, *STORAGES}
# The local header that precedes an entry of a zip file: its signature, its fixed size, and where in
# it the lengths of the name and of the extra field are, two bytes each.
LOCAL_SIGNATURE = b"PK\x03\x04"
LOCAL_HEADER_BYTES = 30
NAME_LENGTH = slice(26, 28)
EXTRA_LENGTH = slice(28, 30)
EXTRA_RECORD_BYTES = 4  # each record of an extra field begins with two bytes and its length in two
ENCRYPTED = 0x1  # flags of an entry
NAME_IS_UTF8 = 0x800
# Bounds.
MOST_DIRECTORY = 1 << 23  # bytes of the zip file's directory; an array takes 100
MOST_LEVELS = 16  # dictionaries inside of one another
MOST_ENTRIES = 200_000  # of all dictionaries together
MOST_NAME = 1000  # characters of an array's name
MOST_REASON = 300  # characters of a message


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it."""

    dtype: np.dtype
    storage: str  # the entry data/STORAGE of the zip file
    storage_entries: int
    offset: int  # in entries of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in entries


class _BoundedReads(io.BufferedReader):
    """A file read in bounded pieces: zipfile reads a whole directory at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return bytes. Raises BadZipFile for more than MOST_DIRECTORY."""
        if size is not None and 0 <= size <= MOST_DIRECTORY:
            return super().read(size)
        content = super().read(MOST_DIRECTORY + 1)
        if len(content) > MOST_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory has more than {MOST_DIRECTORY:,} bytes")
        return content


def read_pth(path: str | Path) -> dict[str, StoredArray]:
    """Return the arrays of a state dict, by "a.b.c" if dictionaries are nested.

    Raises WeightsError for a file that is not torch's zip format, is cut off, or contains
    anything but dictionaries of arrays and plain values; FileError for no regular file.
    """
    path = Path(path)
    with _BoundedReads(open_regular(path).detach()) as file:
        try:
            arrays = _read(path, file)
        except zipfile.BadZipFile as error:
            raise WeightsError(
                f"{path} is not one of PyTorch's zip files, or it is cut off ({_reason(error)})."
                " Download it again; files from before torch 1.6 must be saved anew."
            ) from error
        except Exception as error:  # a broken or hostile pickle can fail in any way
            raise WeightsError(f"{path} cannot be read as weights: {_reason(error)}.") from error

    if not arrays:
        raise WeightsError(f"{path} holds no arrays.")
    return arrays


def _reason(error: Exception) -> str:
    """Return the message of an error, which may quote megabytes of a file."""
    return str(error)[:MOST_REASON] or type(error).__name__


def _read(path: Path, file: io.BufferedReader) -> dict[str, StoredArray]:
    """Return the arrays. Raises ValueError and what a broken file raises."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("two entries of its zip file have one name")
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile(f"{len(pickles) or 'no'} data.pkl inside")

        content = _content(archive, entries[pickles[0]])
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries:
            order = _content(archive, entries[f"{root}byteorder"])
            if order != b"little":
                raise ValueError(f"its arrays are {excerpt(order.decode('latin-1'))} endian")
        ends = _ends(archive)

    arrays = {}
    first_bytes: dict[str, int] = {}  # of the storages
    for name, tensor in _tensors(inert_pickle.load(content, NAMES)):
        entry = entries.get(f"{root}data/{tensor.storage}")
        if entry is None:
            raise ValueError(f"its storage {excerpt(tensor.storage)} is missing")
        if tensor.storage not in first_bytes:
            first_bytes[tensor.storage] = _first_byte(file, entry, ends[entry.header_offset])
        if name in arrays:
            raise ValueError(f"two arrays have the name {excerpt(name)}")
        arrays[name] = _stored(path, entry, first_bytes[tensor.storage], tensor)
    return arrays


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return the bytes of an entry, in bounded memory.

    Raises ValueError if it is compressed.
    """
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its entries are compressed, and PyTorch compresses none")
    with archive.open(entry) as file:  # compares the checksum at the end of the entry
        return file.read(inert_pickle.MOST_BYTES + 1)


def _ends(archive: zipfile.ZipFile) -> dict[int, int]:
    """Return where each entry must have ended, by where its header begins.

    Raises ValueError for two entries in one place.
    """
    begins = sorted(entry.header_offset for entry in archive.infolist())
    ends = dict(zip(begins, [*begins[1:], archive.start_dir], strict=True))
    if len(ends) < len(begins):
        raise ValueError("two entries of its zip file are in one place")
    return ends


def _tensors(content: Any) -> Iterator[tuple[str, _Tensor]]:
    """Yield the tensors of nested dictionaries by name; other values are skipped."""
    nested = content if isinstance(content, dict) else {"": content}
    for number, (name, value) in enumerate(_values(nested, "", MOST_LEVELS)):
        if number == MOST_ENTRIES:
            raise ValueError(f"its dictionaries have more than {MOST_ENTRIES:,} entries")
        if isinstance(value, Call):
            yield name, _tensor(value)


def _values(nested: dict[Any, Any], prefix: str, levels: int) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries by name, dictionaries too."""
    if not levels:
        raise ValueError(f"its dictionaries are nested more than {MOST_LEVELS} deep")
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if len(name) > MOST_NAME:
            raise ValueError(f"the name {excerpt(name)} has more than {MOST_NAME} characters")
        yield name, value
        if isinstance(value, dict):
            yield from _values(value, f"{name}.", levels - 1)


def _tensor(call: Call) -> _Tensor:
    """Return the tensor that a call makes. Raises ValueError for other calls."""
    if call.name == REBUILD_PARAMETER:
        call = call.arguments[0]
        if not isinstance(call, Call):
            raise ValueError("a parameter has no tensor")
    if call.name != REBUILD_TENSOR:
        raise ValueError("a tensor is made in a way that no array needs")

    reference, offset, shape, strides, _, _, *metadata = call.arguments
    if any(metadata):
        raise ValueError("a tensor is stored negated or conjugated")
    if not isinstance(reference, Reference):
        raise ValueError("a tensor has no storage")
    kind, storage_type, storage, _, entries = reference.fields
    if kind != "storage" or storage_type not in STORAGES or not isinstance(storage, str):
        raise ValueError("a tensor has no storage")
    return _Tensor(STORAGES[storage_type], storage, entries, offset, shape, strides)


def _stored(path: Path, entry: zipfile.ZipInfo, first_byte: int, tensor: _Tensor) -> StoredArray:
    """Return a tensor's position.

    Raises ValueError for a tensor that is not inside its storage, or is larger.
    """
    # Sizes and positions that are integers.
    itemsize = tensor.dtype.itemsize
    shape = tensor.shape
    if not isinstance(shape, tuple) or not isinstance(tensor.strides, tuple):
        raise ValueError("the shape or the strides of a tensor are no tuple")
    num_bytes = array_bytes(shape, itemsize)
    positions = (tensor.offset, tensor.storage_entries, *tensor.strides)
    if any(type(position) is not int for position in positions):
        raise ValueError("the position of a tensor is no integer")
    if len(tensor.strides) != len(shape):
        raise ValueError(f"a tensor {shape} has {len(tensor.strides)} strides")

    # A storage of the size that the pickle states.
    if entry.file_size != tensor.storage_entries * itemsize:
        raise ValueError(f"the size of the storage {excerpt(tensor.storage)} is not the pickle's")
    begin = first_byte + tensor.offset * itemsize
    array = StoredArray(path, tensor.dtype, shape, begin, tensor.strides)
    if min(positions) < 0 or tensor.offset + array.extent() > tensor.storage_entries:
        raise ValueError(f"a tensor {shape} reaches beyond its storage")
    if num_bytes > entry.file_size:
        raise ValueError(f"a tensor {shape} repeats the entries of its storage; save it contiguous")
    return array


def _first_byte(file: io.BufferedReader, entry: zipfile.ZipInfo, end: int) -> int:
    """Return where the bytes of an entry begin: after its local header.

    The lengths of that header are written in the header alone. end: where the next entry begins.
    Raises ValueError if the header disagrees with the zip file's directory.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
        raise ValueError("its entries are compressed or encrypted, and PyTorch's are neither")

    # The header, the name and the extra field.
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER_BYTES)
    name = file.read(int.from_bytes(header[NAME_LENGTH], "little"))
    extra = file.read(int.from_bytes(header[EXTRA_LENGTH], "little"))
    first = entry.header_offset + LOCAL_HEADER_BYTES + len(name) + len(extra)

    encoding = "utf-8" if entry.flag_bits & NAME_IS_UTF8 else "cp437"
    same_name = name == entry.orig_filename.encode(encoding)
    if header[:4] != LOCAL_SIGNATURE or not same_name or not _is_extra_field(extra):
        raise ValueError(f"the header of {excerpt(entry.filename)} is damaged")
    if entry.compress_size != entry.file_size or first + entry.file_size > end:
        raise ValueError(f"{excerpt(entry.filename)} reaches into the next entry")
    return first


def _is_extra_field(content: bytes) -> bool:
    """Return whether bytes are the records of an extra field, and nothing more."""
    while len(content) >= EXTRA_RECORD_BYTES:
        length = EXTRA_RECORD_BYTES + int.from_bytes(content[2:EXTRA_RECORD_BYTES], "little")
        if length > len(content):
            return False
        content = content[length:]
    return not content
