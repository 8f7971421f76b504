"""Arrays in files, with type, shape and position available before they are read."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from vdx.interop.keymap import WeightsError

CHUNK = 2**18  # entries that are tested at once: the result stays in the processor's cache


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file, read through a memory map."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file to the first entry
    strides: tuple[int, ...] | None = None  # in entries; None: contiguous, last axis fastest

    def read(self) -> np.ndarray:
        """Return a read-only view of the file; only the entries that are used are read."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)

        flat = np.memmap(self.file, self.dtype, "r", self.offset, (self.extent(),))
        if self.strides is None:
            return flat.reshape(self.shape)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)

    def rows(self, start: int, stop: int) -> "StoredArray":
        """Return the part [start:stop] of the first axis. Reads nothing."""
        step = math.prod(self.shape[1:])
        if self.strides is not None:
            step = self.strides[0]
        return dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * step * self.dtype.itemsize,
        )

    def squeezed(self) -> "StoredArray":
        """Return the array without its leading axes of size one."""
        axes = next((i for i, size in enumerate(self.shape) if size != 1), 0)
        strides = None if self.strides is None else self.strides[axes:]
        return dataclasses.replace(self, shape=self.shape[axes:], strides=strides)

    def extent(self) -> int:
        """Return the number of entries that the array spans in the file, gaps included."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape)
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return last + 1

    @property
    def num_bytes(self) -> int:
        """Bytes from the first entry to the last, ends included."""
        return self.extent() * self.dtype.itemsize


def read_finite(key: str, stored: StoredArray) -> np.ndarray:
    """Return the array of a key.

    Raises WeightsError that names the key if an entry is NaN or infinite.
    """
    value = stored.read()
    rows = max(1, CHUNK // max(1, math.prod(value.shape[1:])))
    parts = value.reshape(1) if value.ndim == 0 else value
    for start in range(0, len(parts), rows):
        if not np.isfinite(parts[start : start + rows]).all():
            raise WeightsError(
                f"{stored.file}: {key} holds NaN or infinity, as after a training that diverged "
                "or a faulty conversion. Use an earlier checkpoint, or download the file again."
            )
    return value
