"""The log survives a kill in the middle of a row, and averages what steps report."""

import numpy as np
import pytest

from vdx.files import read_rows
from vdx.train.compile import StepCost
from vdx.train.log import Log, MetricsAccumulator, last_seconds


def test_rows_after_half_a_line_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 5.0}\n{"step": 2, "sec')
    log = Log(tmp_path, 4, 1)
    log.row(2, {"loss": 0.5})
    log.close()
    rows = read_rows(path)
    assert [r["step"] for r in rows] == [1, 2] and rows[1]["loss"] == 0.5
    assert rows[1]["seconds"] >= 5.0 == last_seconds(path, 1)  # training time is counted on


def step(loss, ok=True, sums=(0.0, 0.0), counts=(0.0, 0.0)):
    numbers = {"loss": loss, "grad_norm": 2 * loss, "ok": ok, "accepted": 1}
    return {**numbers, "bin_sums": np.array(sums), "bin_counts": np.array(counts)}


def test_a_row_averages_the_accepted_steps():
    metrics = MetricsAccumulator()
    for numbers in (
        step(1.0, sums=(2.0, 0.0), counts=(2.0, 0.0)),
        step(np.nan, ok=False, sums=(np.nan, 0.0), counts=(2.0, 0.0)),
        step(3.0, sums=(4.0, 5.0), counts=(1.0, 1.0)),
    ):
        metrics.add(numbers, StepCost(clips=4, tokens=40))
    row = metrics.flush(waited=0.0, learning_rate=0.1, peak=0.0)
    assert (row["train/loss"], row["train/grad_norm"], row["train/learning_rate"]) == (2, 4, 0.1)
    assert (row["train/loss_t0.0-0.5"], row["train/loss_t0.5-1.0"]) == (2.0, 5.0)
    assert row["speed/tokens_per_s"] == pytest.approx(10 * row["speed/clips_per_s"])
    assert metrics.rows == [] and "speed/mfu" not in row
