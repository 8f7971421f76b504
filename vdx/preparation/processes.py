"""Waiting of several processes for one another."""

import jax

__all__ = ["wait_for_all"]

LONGEST = 7 * 24 * 3600  # seconds; one host may decode for days while the others wait


def wait_for_all(name: str) -> None:
    """Wait until every process of the program is here; nothing on the devices is used."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost  # takes a second

        multihost.sync_global_processes(name, timeout=LONGEST)
