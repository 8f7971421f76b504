"""Compiled programs stay on the disk, so that a program is compiled once and not at every start.

It is JAX's persistent cache, switched on. Its key is the program, the options and flags, the
versions of JAX and its backend, and the devices; of a CPU also the instructions it has, and what
was compiled for others is not loaded. So one folder serves every run, and several machines.
"""

import os
from pathlib import Path

import jax

LEAST = 0.5  # seconds to compile, of what is worth a file


def enable_compilation_cache() -> None:
    """For an entrypoint, before anything is compiled. The folder is JAX_COMPILATION_CACHE_DIR, or
    vdx/xla in the user's cache folder; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. It only
    grows: remove it when it is too large."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "vdx" / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
