"""An array in a file."""

import dataclasses
import math
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file. `offset` in bytes; `strides` in entries, None: row after row."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    def read(self) -> np.ndarray:
        """A read-only view of the file; only what is looked at is read."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        if self.strides is None:
            flat = np.memmap(self.file, self.dtype, "r", self.offset, (math.prod(self.shape),))
            return flat.reshape(self.shape)
        flat = np.memmap(self.file, self.dtype, "r", self.offset, (self.extent(),))
        return np.lib.stride_tricks.as_strided(
            flat, self.shape, [s * self.dtype.itemsize for s in self.strides], writeable=False
        )

    def rows(self, start: int, stop: int) -> "StoredArray":
        """Where [start:stop] of it lies. Reads nothing."""
        step = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        return dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * step * self.dtype.itemsize,
        )

    def squeezed(self) -> "StoredArray":
        """Without its leading axes of size one."""
        axes = next((i for i, n in enumerate(self.shape) if n != 1), 0)
        return dataclasses.replace(
            self, shape=self.shape[axes:], strides=self.strides and self.strides[axes:]
        )

    def extent(self) -> int:
        """Entries from the first to the last, ends included."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape)
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
