"""Training objectives: each turns a batch into losses; one loop trains them all.

To add one, write a file in this folder and a row here.
"""

from collections.abc import Callable

from vdx.train.objectives.denoising import Objective

__all__ = ["OBJECTIVES", "Objective"]

# name -> a dataclass whose instances are objectives.
OBJECTIVES: dict[str, Callable[..., Objective]] = {"denoising": Objective}
