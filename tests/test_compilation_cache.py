"""The compilation cache: a program that one process compiles is loaded by the next."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import jax, jax.numpy as jnp
from vdx.compilation_cache import enable_compilation_cache
enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))
print(jax.config.jax_compilation_cache_dir, "cache_hits" in events, "cache_misses" in events)
"""


def run_process(**env):
    """Compile a program in a process of its own: its cache folder, cache hit?, cache miss?"""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") or "PLATF" in k}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        text=True,
        check=True,
        capture_output=True,
        env={**keep, "XLA_FLAGS": "", **env},
    )
    return done.stdout.split()


def test_the_folder_is_the_users_cache_and_serves_the_next_process(tmp_path):
    folder = tmp_path / "vdx" / "xla"
    assert run_process(XDG_CACHE_HOME=str(tmp_path)) == [str(folder), "False", "True"]
    assert list(folder.iterdir())
    assert run_process(XDG_CACHE_HOME=str(tmp_path)) == [str(folder), "True", "False"]
    own = str(tmp_path / "own")
    assert run_process(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=own)[0] == own
    off = run_process(XDG_CACHE_HOME=str(tmp_path / "off"), JAX_ENABLE_COMPILATION_CACHE="false")
    assert off[1:] == ["False", "False"] and not (tmp_path / "off").exists()
