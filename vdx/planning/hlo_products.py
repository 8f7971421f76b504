"""Operations of products and convolutions of HLO."""

import functools
import re

import numpy as np


def _convolution(
    left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> float:
    """Two for every pair of an output and an entry of the kernel that reads no padding and no hole:
    batched products are convolutions with holes to XLA."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None, attributes
    window = dict(
        re.findall(
            r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]
        )
    )
    at = lambda key, i, default: window[key].split("x")[i] if key in window else default
    pairs = (
        2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    )
    for i in range(len(labels[1]) - 2):
        size, kernel, results = (
            sizes[label.index(str(i))]
            for sizes, label in zip((left, right, out), labels.groups(), strict=True)
        )
        pairs *= _read(
            size,
            kernel,
            results,
            int(at("stride", i, 1)),
            int(at("pad", i, "0_0").split("_")[0]),
            int(at("lhs_dilate", i, 1)),
            int(at("rhs_dilate", i, 1)),
        )
    return pairs


@functools.cache
def _read(size: int, kernel: int, results: int, step: int, low: int, hole: int, apart: int) -> int:
    """Along one axis: pairs of a result and an entry of the kernel that read an entry."""
    place = np.arange(results)[:, None] * step + np.arange(kernel) * apart - low
    return int(((place >= 0) & (place <= (size - 1) * hole) & (place % hole == 0)).sum())
