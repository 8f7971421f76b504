"""The log survives a kill in the middle of a row, and averages what steps report."""

from vdx.files import read_rows
from vdx.train.log import Log, last_seconds


def test_rows_after_half_a_line_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 5.0}\n{"step": 2, "sec')
    log = Log(tmp_path, 4, 1)
    log.row(2, {"loss": 0.5})
    log.close()
    rows = read_rows(path)
    assert [r["step"] for r in rows] == [1, 2] and rows[1]["loss"] == 0.5
    assert rows[1]["seconds"] >= 5.0 == last_seconds(path, 1)  # training time is counted on
