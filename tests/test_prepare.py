"""The command vdx.prepare: what it prints, and what it refuses."""

import pytest

from tests.command_line import run_here
from tests.kill_prepare import write_footage


def prepare(capsys, *args):
    return run_here(capsys, "vdx.prepare", "--workers=0", *args)


def test_it_prepares_a_folder_up_to_a_stage(tmp_path, capsys):
    write_footage(tmp_path / "in", 2, frames=18)
    ended = prepare(capsys, f"--source={tmp_path / 'in'}", f"--out={tmp_path / 'out'}",
                    "--until=decide")  # fmt: skip
    assert ended.code == 0
    assert "2 files, 2 of them with captions" in ended.out
    assert "Kept 2 of 2 clips, 3.0 of 3.0 seconds." in ended.out
    assert (tmp_path / "out" / "clips.jsonl").exists()
    assert not (tmp_path / "out" / "clips").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--source={in}", "--out={in}/out"], "neither may contain the other"),
        (["--source={in}", "--out={other}"], "has other files"),
        (["--source={in}/nothing", "--out={out}"], "There is no folder"),
        (["--source={in}", "--out={out}", "--beam.runner=DirectRunner"], "--runner=beam"),
        (["--source={in}", "--out={out}", "--config.decide.min_second=2"], "min_seconds"),
        (["--source={in}", "--out={out}", "--until=latent"], "until"),
        (["--source={in}"], "--out is missing"),
    ],
)
def test_mistakes_are_refused(tmp_path, capsys, args, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    names = {name: tmp_path / name for name in ("in", "out", "other")}
    ended = prepare(capsys, *(arg.format(**names) for arg in args))
    assert ended.code and message in ended.err and "Traceback" not in ended.err
