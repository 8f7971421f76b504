"""The Python example of README.md runs as it stands."""

import re
from pathlib import Path

import av

from vdx.files import read_json

ROOT = Path(__file__).parents[1]


def test_the_python_example_runs(workdir, tmp_path, monkeypatch, capsys):
    """On the workdir of a micro run, where the README has a trained one."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(workdir)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(example.group(1), names)
    assert "(8, 32, 32, 3)" in capsys.readouterr().out
    with av.open("out.mp4") as video:
        assert video.streams.video[0].frames == 8
    assert read_json("out.json")["request"]["seed"] == 3
    assert [clip.seed for clip in names["clips"]] == [0, 1]
