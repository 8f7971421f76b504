"""What a run says: a progress bar, `metrics.jsonl`, and TensorBoard event files."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from vdx.files import append_rows, read_rows


class Log:
    """Writes one row of scalars at a time; silent on every process but the first.

    A row goes to `<workdir>/metrics.jsonl` as {"step", "seconds", **scalars}, where seconds
    counts training time over all parts of an interrupted run.
    """

    def __init__(self, workdir: Path, steps: int, start: int):
        self.primary = jax.process_index() == 0
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not self.primary,
            dynamic_ncols=True,
            desc="train",
            smoothing=0.05,
        )
        if not self.primary:
            return
        self.path = workdir / "metrics.jsonl"
        self.began = time.monotonic() - last_seconds(self.path, start)
        self.events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)

    def row(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self.primary:
            return
        seconds = round(time.monotonic() - self.began, 3)
        append_rows(self.path, [{"step": step, "seconds": seconds, **scalars}])
        for name, value in scalars.items():
            self.events.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.primary:
            self.bar.write(text, file=sys.stderr)  # not held back in a buffer

    def close(self) -> None:
        self.bar.close()
        if self.primary:
            self.events.close()


def last_seconds(path: Path, step: int) -> float:
    """Training time that an earlier part of the run had logged when it reached `step`."""
    return max((r["seconds"] for r in read_rows(path) if r["step"] <= step), default=0.0)
