"""The interface of mixers, and their input besides the tokens."""

from typing import Protocol, runtime_checkable

import flax.struct

from vdx.models.positions import Grid, Rope
from vdx.types import Array, Float

__all__ = ["CachePosition", "Grid", "MixContext", "Mixer"]


class CachePosition(flax.struct.PyTreeNode):
    """The position of a block that is processed alone (see vdx.generate.blockwise)."""

    start: Array  # int32 [], frames of tokens before the block
    # Blocks in the cache of a mixer without a window.
    blocks: int = flax.struct.field(pytree_node=False)


class MixContext(flax.struct.PyTreeNode):
    """The input of a mixer besides the tokens."""

    rope: Rope  # rotary positions of the token grid
    past: CachePosition | None = None  # None: the tokens are a whole clip
    attention: str = flax.struct.field(pytree_node=False, default="auto")  # as in `attend`
    # A row of CONTEXTS, for attention between all tokens on a mesh that splits them.
    context_parallel: str = flax.struct.field(pytree_node=False, default="gather")


@runtime_checkable
class Mixer(Protocol):
    """A linen module `(heads, dtype, **fields)` that mixes the tokens of a clip."""

    @property
    def temporal(self) -> bool:
        """Return whether it works over time alone; an image then skips its block."""

    @property
    def crosses_frames(self) -> bool:
        """Return whether a token reads frames other than its own."""

    @property
    def causal_block(self) -> int | None:
        """Return the frames of a block, if a clip can be made block by block with a cache."""

    def flops(self, grid: Grid, width: int) -> float:
        """Return the operations of one forward pass of one clip.

        They are those of matrix products and convolutions, two to a multiply-add.
        """

    def __call__(
        self, x: Float[Array, "b t h w d"], context: MixContext
    ) -> Float[Array, "b t h w d"]:
        """Mix the tokens of the grid."""
