"""Peak rates and memory of the chips that programs run on.

The numbers are the vendors', of what JAX calls a device. TPUs: the pages "TPU v4", "v5e", "v5p",
"v6e" and "TPU7x (Ironwood)" of the Google Cloud TPU documentation (docs.cloud.google.com/tpu/docs),
which give interconnect in Gbps or, of both directions together, in GBps. GPUs: NVIDIA's data
sheets of the A100, H100, H200 (SXM) and of the DGX B200, tensor cores without sparsity, NVLink
also of both directions together.

Interconnect is here what a chip can send through all its links while it receives as much. Hosts of
GPUs are connected by a slower network, which is not in the table.
"""

import dataclasses
import re

GIB = 2.0**30
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them."""

    kind: str  # regex of JAX's name for it, `device_kind`
    flops: float  # dense bfloat16 operations a second, two to a multiply-add
    memory: float  # bytes
    bandwidth: float  # bytes a second to and from its memory
    interconnect: float  # bytes a second that it can send to the others of its slice
    per_host: int  # devices of a full host
    per_chip: int = 1  # devices of what is sold as a chip


# Name in --topology -> chip. A device is the first row whose regex matches.
CHIPS: dict[str, Chip] = {
    "v4": Chip(r"TPU v4$", 275e12, 32 * GIB, 1228 * GB, 300 * GB, 4),
    "v5e": Chip(r"TPU v5 ?(lite|e)", 197e12, 16 * GIB, 819 * GB, 200 * GB, 8),
    "v5p": Chip(r"TPU v5p?$", 459e12, 95 * GIB, 2765 * GB, 600 * GB, 4),
    "v6e": Chip(r"TPU v6 ?(lite|e)", 918e12, 32 * GIB, 1638 * GB, 400 * GB, 8),
    # The vendor's numbers are of a chip, which is two devices.
    "tpu7x": Chip(r"TPU ?7x", 2307e12 / 2, 96 * GIB, 7380 * GB / 2, 600 * GB / 2, 8, 2),
    "a100-40": Chip(r"A100.*40GB", 312e12, 40 * GIB, 1555 * GB, 300 * GB, 8),
    "a100": Chip(r"A100", 312e12, 80 * GIB, 2039 * GB, 300 * GB, 8),
    "h100-pcie": Chip(r"H100 PCIe", 756e12, 80 * GIB, 2000 * GB, 64 * GB, 8),
    "h100": Chip(r"H100", 989e12, 80 * GIB, 3350 * GB, 450 * GB, 8),
    "h200": Chip(r"H200", 989e12, 141 * GB, 4800 * GB, 450 * GB, 8),
    "b200": Chip(r"B200", 2250e12, 180 * GB, 8000 * GB, 900 * GB, 8),
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the row of a device by JAX's name for it, such as "TPU v5 lite".

    None for a device that is not in the table, such as a CPU.
    """
    for chip in CHIPS.values():
        if re.search(chip.kind, device_kind):
            return chip
    return None
