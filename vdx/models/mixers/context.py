"""What a mixer is given besides the tokens."""

from typing import Any

import flax.struct

from vdx.types import Array


class CachePosition(flax.struct.PyTreeNode):
    """What came before the block that a network is given alone (see vdx.generate.blockwise).

    start: int32 [], frames of tokens before it. blocks: how many blocks the cache of a mixer
    without a window holds.
    """

    start: Array
    blocks: int = flax.struct.field(pytree_node=False)


class MixContext(flax.struct.PyTreeNode):
    """What a mixer may need besides the tokens: rotary tables [t h w 1 d/2] (cos, sin), the past
    of a block that comes alone, and the backend of attention and how "full" attention meets keys
    on other devices (see attend)."""

    rope: tuple[Any, Any]
    past: CachePosition | None = None
    attention: str = flax.struct.field(pytree_node=False, default="auto")
    across: str = flax.struct.field(pytree_node=False, default="gather")
