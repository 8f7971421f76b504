"""Batches of one shape through a network, smaller ones where memory runs out."""

from collections.abc import Callable

import jax
import numpy as np

from vdx.generate.pretrained_networks import Log, chunks
from vdx.programs import OUT_OF_MEMORY

__all__ = ["BatchRunner"]

Call = Callable[..., np.ndarray]


class BatchRunner:
    """Evaluates a network on batches of one size; halves it when memory runs out.

    Repetitions fill the last batch, so that one program is compiled for a shape and each result
    does not depend on the rows next to it.
    """

    def __init__(self, size: int, parts: int, log: Log = print) -> None:
        """size: rows of a batch on each of `parts` devices."""
        self.size = size
        self.parts = parts
        self.log = log

    @property
    def rows(self) -> int:
        """Rows of a batch on all devices."""
        return self.size * self.parts

    def __call__(self, call: Call, *arrays: np.ndarray) -> np.ndarray:
        """Return call(*rows of the arrays), for all rows."""
        while True:
            try:
                parts = [
                    call(*(array[rows] for array in arrays))
                    for rows in chunks(len(arrays[0]), self.rows)
                ]
            except jax.errors.JaxRuntimeError as error:
                if OUT_OF_MEMORY not in str(error) or self.size == 1:
                    raise
                self.size //= 2
                self.log(f"Out of memory: {self.size} at once on each device from here on.")
            else:
                return np.concatenate(parts)[: len(arrays[0])]
