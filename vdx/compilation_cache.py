"""A persistent compilation cache: a program is compiled once, not at every start.

This switches on JAX's own cache. Its key consists of the program, the compiler options and flags,
the versions of JAX and its backend, and the devices. The key of a CPU also lists its instructions,
so that a program compiled for another CPU is not loaded. One folder therefore serves every run and
several machines.
"""

import os
from pathlib import Path

import jax

MIN_COMPILE_SECONDS = 0.5  # a program that compiles faster is not worth a file (JAX's default: 1)


def enable_compilation_cache() -> None:
    """Switch on the persistent cache, before an entry point compiles anything.

    The folder is JAX_COMPILATION_CACHE_DIR, or vdx/xla in the user's cache folder. Set
    JAX_ENABLE_COMPILATION_CACHE=false to store nothing. The folder only grows: remove it when it
    becomes too large.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "vdx" / "xla"))

    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
