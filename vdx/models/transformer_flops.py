"""The operations of a transformer, by a formula."""

import math
from typing import Any, Protocol, runtime_checkable

from vdx.models.transformer_blocks import TransformerDims, has_cross_attention, standalone_mixer
from vdx.types import Ports

SINUSOID = 256  # features of the sinusoid of the time


@runtime_checkable
class SizedTransformer(Protocol):
    """The sizes of a transformer that its operations depend on; see Transformer."""

    channels: int
    patch: tuple[int, int, int]
    skip: bool
    activation: str
    cross: str

    def dims(self) -> TransformerDims:
        """Return the resolved dimensions."""
        ...

    def hidden(self) -> int:
        """Return the hidden features of an MLP."""
        ...

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the grid of tokens of a clip [t h w c]."""
        ...


def transformer_flops(network: SizedTransformer, shape: tuple[int, ...], ports: Ports) -> float:
    """Return the operations of one forward pass of one clip [t h w c].

    They are those of the matrix products. A multiply-add counts as two. The ports may be of a batch
    of any size; their shapes are enough.
    """
    dims = network.dims()
    grid = network.grid(shape)
    tokens = math.prod(grid)
    patch = math.prod(network.patch)

    blocks = [
        _block_flops(network, standalone_mixer(spec, dims.heads), grid, ports)
        for spec in dims.pattern
    ]

    # Multiply-adds of a pixel: the projections of patches, in and out.
    concat = 0 if ports.concat is None else ports.concat.shape[-1]
    pixel = 1.0 * dims.width * (2 * network.channels + concat)
    pixel += network.skip * patch * concat * network.channels
    if ports.control is not None:
        blocks.append(blocks[0] + 2.0 * tokens * dims.width**2)  # a control block and its hint
        pixel += dims.width * (ports.control.shape[-1] + dims.width / patch)

    # Multiply-adds of the time embedding and of the modulation.
    time = dims.width * (SINUSOID + 7.0 * dims.width)
    return dims.periods * sum(blocks) + 2.0 * (tokens * patch * pixel + time)


def _block_flops(
    network: SizedTransformer, mixer: Any, grid: tuple[int, int, int], ports: Ports
) -> float:
    """Return the operations of one block; an image skips one over time alone."""
    if mixer.temporal and grid[0] == 1:
        return 0.0
    width = network.dims().width
    hidden = network.hidden()
    hidden_out = hidden / 2 if network.activation == "geglu" else hidden
    mlp = 2.0 * math.prod(grid) * width * (hidden + hidden_out)
    return mixer.flops(grid, width) + _cross_flops(network, mixer, grid, ports) + mlp


def _cross_flops(
    network: SizedTransformer, mixer: Any, grid: tuple[int, int, int], ports: Ports
) -> float:
    """Return the operations of the cross-attention of one block."""
    if ports.tokens is None or not has_cross_attention(mixer, network.cross):
        return 0.0
    width = network.dims().width
    tokens = math.prod(grid)
    read = [x.shape[1:] for x in (ports.tokens, ports.image_tokens) if x is not None]
    keys = sum(length * (features + tokens) for length, features in read)
    return 4.0 * width * (tokens * width + keys)
