"""Packages that only some commands need: extras of the installation."""

import importlib
from typing import Any

from vdx.config.build import ConfigError

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> Any:
    """Return a module of an extra. Raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ConfigError(
            f"This needs the package of {module!r}, which is not installed: "
            f"pip install 'vdx[{extra}]'"
        ) from error
