"""Several processes of one program: their flags, and how they join one another."""

import re

import jax
from absl import app, flags

from vdx.config.ranges import Count, Index, define_number

__all__ = ["define_process_flags", "join_processes"]

FLAGS = flags.FLAGS


def join_processes() -> None:
    """Join the other processes of the run, if the flags name any. Raises UsageError."""
    numbers = (FLAGS.num_processes, FLAGS.process_id)
    if not FLAGS.coordinator:
        if numbers != (None, None):
            raise app.UsageError("--num_processes and --process_id need --coordinator=HOST:PORT.")
        if FLAGS.distributed:
            jax.distributed.initialize(heartbeat_timeout_seconds=FLAGS.heartbeat)
        return

    if not re.fullmatch(r".+:\d+", FLAGS.coordinator):
        raise app.UsageError(f"--coordinator={FLAGS.coordinator} is not like host:1234.")
    if None in numbers or FLAGS.process_id >= FLAGS.num_processes:
        raise app.UsageError(
            "--coordinator needs --num_processes=N, and a --process_id from 0 to N - 1."
        )
    jax.distributed.initialize(
        FLAGS.coordinator, *numbers, heartbeat_timeout_seconds=FLAGS.heartbeat
    )


def define_process_flags() -> None:
    """Define the flags that `join_processes` reads."""
    flags.DEFINE_bool(
        "distributed",
        False,
        "One of several processes (hosts) of a run, which jax.distributed.initialize() finds.",
    )
    flags.DEFINE_string(
        "coordinator", None, "host:port of the first process, where JAX cannot find it by itself."
    )
    define_number("num_processes", None, Count, "The number of processes, with --coordinator.")
    define_number("process_id", None, Index, "The number of this process, with --coordinator.")
    define_number(
        "heartbeat",
        100,
        Count,
        "Seconds after which a silent process counts as dead, and the others end.",
    )
