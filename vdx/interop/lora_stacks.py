"""The arrays of a LoRA file, stacked as our parameters are."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from vdx.interop.keymap import Slot
from vdx.models.adapters.lora import A, B
from vdx.types import Params

__all__ = ["DeltaStacker", "FactorPair", "FactorStacker", "FindSlot"]

FindSlot = Callable[[str], Slot | None]  # a key of diffusers -> where it goes


class FactorPair(NamedTuple):
    """The factors of one layer as files have them, float32."""

    a: np.ndarray  # [r in ...]
    b: np.ndarray  # [out r ...]

    @property
    def rank(self) -> int:
        return len(self.a)


def _slot(find_slot: FindSlot, key: str) -> Slot:
    slot = find_slot(key)
    assert slot is not None, key  # the key has been looked up in the plan
    return slot


class FactorStacker:
    """Collects the factors of single layers, and stacks them as our parameters are.

    A layer without factors is zero, and so are the ranks that a layer of a smaller rank lacks.
    """

    def __init__(self, leaves: Mapping[str, Any], find_slot: FindSlot) -> None:
        """Take our abstract parameters by path, and where keys of factors go."""
        self.leaves = leaves
        self.find_slot = find_slot
        # path of the kernel's layer -> {index in the stack: (a, b) in our layout}
        self.found: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)

    def add(self, layer: str, pair: FactorPair, scale: float) -> None:
        """Add the factors of one layer; `scale` is multiplied into B."""
        to_a = _slot(self.find_slot, f"{layer}.lora_A.weight")
        to_b = _slot(self.find_slot, f"{layer}.lora_B.weight")
        path = to_a.path.removesuffix(f"/{A}")
        self.found[path][to_a.index] = (to_a.layout.ours(pair.a), scale * to_b.layout.ours(pair.b))

    def stacked(self) -> Params:
        """Return the tree of factors, those of a stack in one array."""
        stacked = {}
        for path, parts in self.found.items():
            *layers, fan_in, fan_out = self.leaves[f"{path}/kernel"].shape
            rank = max(len(b) for _, b in parts.values())
            a = np.zeros((*layers, fan_in, rank), np.float32)
            b = np.zeros((*layers, rank, fan_out), np.float32)
            for index, (layer_a, layer_b) in parts.items():
                at = () if index is None else (index,)
                own_rank = len(layer_b)
                a[at][:, :own_rank] = layer_a
                b[at][:own_rank] = layer_b
            stacked[f"{path}/{A}"] = a
            stacked[f"{path}/{B}"] = b
        return unflatten_dict(stacked, sep="/")


class DeltaStacker:
    """Collects whole differences of parameters, summed over the layers of a stack."""

    def __init__(self, leaves: Mapping[str, Any], find_slot: FindSlot) -> None:
        """Take our abstract parameters by path, and where keys of weights go."""
        self.leaves = leaves
        self.find_slot = find_slot
        self.arrays: dict[str, np.ndarray] = {}  # path -> difference of the whole stack

    def add(self, key: str, value: np.ndarray) -> None:
        """Add the difference of one array of a file."""
        to = _slot(self.find_slot, key)
        if to.path not in self.arrays:
            self.arrays[to.path] = np.zeros(self.leaves[to.path].shape, np.float32)
        index = () if to.index is None else to.index
        self.arrays[to.path][index] += to.layout.ours(value)
