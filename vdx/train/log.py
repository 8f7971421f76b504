"""The log of a run: a progress bar, `metrics.jsonl`, and TensorBoard event files."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from vdx.files import append_rows, read_rows
from vdx.train.compile import StepCost

__all__ = ["Log", "MetricsAccumulator", "last_seconds"]

Row = dict[str, Any]  # the metrics of one step, as JSON values

# Entries of the log, by their short names on the progress bar.
ON_THE_BAR = {"clips_s": "speed/clips_per_s", "mfu": "speed/mfu", "loss": "train/loss"}


class Log:
    """Writer of scalars, one row at a time; silent on every process but the first.

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
        """Write the scalars of a step."""
        if not self.primary:
            return
        seconds = round(time.monotonic() - self.began, 3)
        append_rows(self.path, [{"step": step, "seconds": seconds, **scalars}])
        for name, value in scalars.items():
            self.events.add_scalar(name, value, step)

    def show(self, scalars: Mapping[str, float]) -> None:
        """Show the main scalars of a row on the progress bar."""
        values = {name: f"{scalars[key]:.4g}" for name, key in ON_THE_BAR.items() if key in scalars}
        self.bar.set_postfix(refresh=False, **values)

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.primary:
            self.bar.write(text, file=sys.stderr)  # stderr is not buffered

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self.bar.update()

    def move_back(self, step: int) -> None:
        """Move the progress bar back to a step."""
        self.bar.n = step
        self.bar.refresh()

    def close(self) -> None:
        """Close the progress bar and the event files."""
        self.bar.close()
        if self.primary:
            self.events.close()


def last_seconds(path: Path, step: int) -> float:
    """Return the training time that an earlier part of the run had logged at `step`."""
    return max((row["seconds"] for row in read_rows(path) if row["step"] <= step), default=0.0)


class MetricsAccumulator:
    """The metrics of the steps since the last log row.

    They are saved with the checkpoints, so that a resumed run logs the same losses. Speeds
    count from the moment that this process began or last logged.
    """

    def __init__(self, rows: list[Row] | None = None, waited: float = 0.0):
        self.rows: list[Row] = rows or []
        self.start_clock(waited)

    def start_clock(self, waited: float) -> None:
        """Count speeds from now; `waited` is the time spent on data so far, in seconds."""
        self.cost = StepCost()
        self.began = time.perf_counter()
        self.waited = waited

    def add(self, metrics: Mapping[str, Any], cost: StepCost) -> None:
        """Add the metrics of one step, fetched from the devices."""
        self.rows.append({name: np.asarray(value).tolist() for name, value in metrics.items()})
        self.cost = StepCost(
            clips=self.cost.clips + cost.clips,
            tokens=self.cost.tokens + cost.tokens,
            flops=self.cost.flops + cost.flops,
        )

    def flush(self, waited: float, learning_rate: float, peak: float) -> dict[str, float]:
        """Return the scalars of a log row and start anew.

        Args:
          waited: seconds spent waiting for data since the run began.
          peak: operations a second of all devices at best; 0: unknown.
        """
        scalars = {"train/learning_rate": learning_rate, **self._speeds(waited, peak)}
        # Refused steps may hold NaN.
        if accepted := [row for row in self.rows if row["ok"]]:
            scalars |= mean_losses(accepted)
        self.rows = []
        self.start_clock(waited)
        return scalars

    def _speeds(self, waited: float, peak: float) -> dict[str, float]:
        """Return clips, tokens and operations a second, and the time share lost to data."""
        elapsed = time.perf_counter() - self.began
        speeds = {
            "speed/clips_per_s": self.cost.clips / elapsed,
            "speed/tokens_per_s": self.cost.tokens / elapsed,
            "speed/data_wait": (waited - self.waited) / elapsed,
        }
        if peak:
            speeds["speed/mfu"] = self.cost.flops / elapsed / peak
        memory = jax.local_devices()[0].memory_stats() or {}
        if most := memory.get("peak_bytes_in_use"):
            speeds["speed/peak_memory_gib"] = most / 2**30
        return speeds


def mean_losses(rows: list[Row]) -> dict[str, float]:
    """Average losses and gradient norms over steps.

    `loss_t0.0-0.2` is the loss of one interval of diffusion time.
    """
    names = ["loss", "grad_norm"]
    names += [name for name in rows[0] if name.startswith(("loss_", "gradient_share_"))]
    means = {f"train/{name}": float(np.mean([row[name] for row in rows])) for name in names}

    sums = np.sum([row["bin_sums"] for row in rows], axis=0)
    counts = np.sum([row["bin_counts"] for row in rows], axis=0)
    edges = np.linspace(0, 1, len(sums) + 1)
    for low, high, total, count in zip(edges[:-1], edges[1:], sums, counts, strict=True):
        if count:
            means[f"train/loss_t{low:.1f}-{high:.1f}"] = float(total / count)
    return means
