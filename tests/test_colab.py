"""The notebooks run from top to bottom at a very small size."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.micro_run import MICRO

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path, monkeypatch):
    monkeypatch.setenv("VDX_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("VDX_OPTIONS", " ".join(f'"{option}"' for option in MICRO))
    monkeypatch.setenv("XLA_FLAGS", "")
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert "Open" in text and "chance" in text  # trained, evaluated
    videos = sum(o["data"].get("text/html", "").count("<video") for o in outputs if "data" in o)
    assert videos == 4  # two of the sample grid, two that the last cell generates


def first_cell(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])


def run_first_cell(path: Path, folder: Path, repository: str) -> subprocess.CompletedProcess:
    """Run the first cell of a notebook in a folder, without vdx on the path."""
    return subprocess.run(
        [sys.executable, "-c", first_cell(path)],
        cwd=folder,
        env={**os.environ, "VDX_REPOSITORY": repository, "PYTHONPATH": ""},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository of the files here, to clone without a network."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "vdx").mkdir()
    shutil.copy(ROOT / "vdx" / "main.py", folder / "vdx")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "."]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_clones_where_there_is_no_clone(path, repository, tmp_path):
    for _ in range(2):  # run again it takes the clone that is there
        done = run_first_cell(path, tmp_path, f"file://{repository}")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"vdx is in {tmp_path / 'vdx'}\n"
    assert (tmp_path / "vdx" / "configs" / "t2v_tiny.py").exists()

    (tmp_path / "vdx" / "colab").mkdir()
    inside = run_first_cell(path, tmp_path / "vdx" / "colab", "")
    assert inside.stdout == f"vdx is in {tmp_path / 'vdx'}\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_says_what_it_cannot_clone(path, tmp_path):
    address = f"file://{tmp_path / 'none'}"
    nowhere = run_first_cell(path, tmp_path, address)
    assert nowhere.returncode == 1
    # git says in its own words that nothing is there, and other versions in others.
    command = re.escape(f"git clone --depth=1 {address} {tmp_path / 'vdx'}")
    assert re.search(rf"{command} failed:\n.*fatal: \S", nowhere.stderr, re.DOTALL)
    unset = run_first_cell(path, tmp_path, "")
    assert unset.returncode == 1 and "set REPOSITORY above" in unset.stderr
    assert "Traceback" not in nowhere.stderr + unset.stderr
