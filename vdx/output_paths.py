"""Checks of output paths, before hours of work depend on them."""

import os
from collections.abc import Collection
from pathlib import Path

from vdx.config.build import ConfigError

__all__ = ["check_output_file", "check_output_folder"]


def check_output_file(path: Path, flag: str, suffixes: Collection[str]) -> None:
    """Raise ConfigError if a file cannot be written.

    Folders above it need not exist yet. flag: the flag that names the path. suffixes: those that
    can be written, such as ".mp4".
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(
            f"--{flag}={path}: a file that ends in {path.suffix or 'no suffix'} cannot be "
            f"written; expected {' or '.join(suffixes)}."
        )
    if path.exists() and not path.is_file():
        raise ConfigError(f"--{flag}={path} exists and is not a file; name another one.")
    _check_writable(path.parent, path.name, f"--{flag}={path}")


def check_output_folder(path: Path, flag: str) -> None:
    """Raise ConfigError if nothing can be written into a folder.

    It need not exist yet. flag: the flag that names the path.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--{flag}={path} exists and is not a folder; name another one.")
    _check_writable(path, "part", f"--{flag}={path}")


def _check_writable(folder: Path, name: str, where: str) -> None:
    """Write and remove an empty file in a folder, or the nearest one above it."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    probe = existing / f".{name}.{os.getpid()}"
    try:
        if not existing.is_dir():
            raise NotADirectoryError(None, f"{existing} is a file, not a folder")
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{where} cannot be written: {reason}. Name a place in a folder that you can write."
        ) from error
