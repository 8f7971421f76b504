"""Video diffusion in JAX, TPU first.

    import vdx
    pipe = vdx.load("runs/tiny")
    pipe("a red circle moves right", seed=3).save("out.mp4")

Names are imported when they are first used, so that `import vdx` is cheap.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from vdx.exits import exit_at_interrupts

if TYPE_CHECKING:
    from vdx.generate.clip import Clip as Clip
    from vdx.generate.pipeline import Pipeline as Pipeline
    from vdx.load_pipeline import load as load

__version__ = "0.1.0"
__all__ = ["Clip", "Pipeline", "__version__", "load"]

# Public name -> the module that defines it.
_MODULES = {
    "Clip": "vdx.generate.clip",
    "Pipeline": "vdx.generate.pipeline",
    "load": "vdx.load_pipeline",
}

if sys.argv[:1] == ["-m"]:  # `python -m vdx.NAME` imports this package before the module
    exit_at_interrupts()


def __getattr__(name: str) -> Any:
    """Import a public name on its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'vdx' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return __all__
