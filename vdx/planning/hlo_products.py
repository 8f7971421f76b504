"""Operations of the products and convolutions in a compiled program's text.

A multiply-add is two operations. Elementwise operations do not count.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from vdx.planning.hlo_text import Array

_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")  # "0bf_0oi->0bf"
_WINDOW = re.compile(r"window=\{([^}]*)\}")  # "window={size=4x1 stride=3x1 pad=0_0x1_1}"
_WINDOW_FIELD = re.compile(r"(\w+)=([\w\-]+)")


def dot_flops(left: Array, out: Array, attributes: str) -> float:
    """Return two operations for every output and every entry of the contracted axes."""
    contracted: list[int] = []  # none in an outer product
    dims = _CONTRACTED.search(attributes)
    if dims:
        contracted = [int(axis) for axis in dims[1].split(",") if axis]
    return 2.0 * math.prod(out.sizes) * math.prod(left.sizes[axis] for axis in contracted)


class AxisWindow(NamedTuple):
    """How the kernel of a convolution moves along one axis of space."""

    stride: int
    pad_low: int  # zeros before the first entry of the input
    input_dilation: int  # distance of two entries of the input; holes are between them
    kernel_dilation: int  # distance of two entries of the kernel


def convolution_flops(left: Array, right: Array, out: Array, attributes: str) -> float:
    """Return two operations for every pair of an output and a kernel entry.

    A pair that reads padding or a hole, not an entry of the input, does not count: XLA writes
    batched products as convolutions of a dilated input, most of whose entries are holes.
    """
    labels = _LABELS.search(attributes)
    assert labels is not None, attributes
    left_labels, right_labels, out_labels = labels.groups()
    fields = window_fields(attributes)

    # Batch, output features, and input features, of which a group has its own.
    flops = (
        2.0
        * out.sizes[out_labels.index("b")]
        * out.sizes[out_labels.index("f")]
        * right.sizes[right_labels.index("i")]
    )

    # The axes of space are digits; the two other labels are batch and features.
    for axis in range(len(left_labels) - 2):
        flops *= pairs_along_axis(
            left.sizes[left_labels.index(str(axis))],
            right.sizes[right_labels.index(str(axis))],
            out.sizes[out_labels.index(str(axis))],
            axis_window(fields, axis),
        )
    return flops


def window_fields(attributes: str) -> dict[str, str]:
    """Return {field: one value an axis, separated by x} of a convolution's window."""
    window = _WINDOW.search(attributes)
    return dict(_WINDOW_FIELD.findall(window[1])) if window else {}


def axis_window(fields: dict[str, str], axis: int) -> AxisWindow:
    """Return the window along one axis; the text omits fields at their default."""

    def value(field: str, default: str) -> str:
        return fields[field].split("x")[axis] if field in fields else default

    return AxisWindow(
        stride=int(value("stride", "1")),
        pad_low=int(value("pad", "0_0").split("_")[0]),
        input_dilation=int(value("lhs_dilate", "1")),
        kernel_dilation=int(value("rhs_dilate", "1")),
    )


@functools.cache
def pairs_along_axis(inputs: int, kernel: int, outputs: int, window: AxisWindow) -> int:
    """Count the pairs of an output and a kernel entry that read an entry of the input."""
    output_start = np.arange(outputs)[:, None] * window.stride - window.pad_low
    place = output_start + np.arange(kernel) * window.kernel_dilation  # [outputs kernel]

    in_range = (place >= 0) & (place <= (inputs - 1) * window.input_dilation)
    on_entry = place % window.input_dilation == 0
    return int((in_range & on_entry).sum())
