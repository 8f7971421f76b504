"""The notebooks run from top to bottom at a very small size."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.micro_run import MICRO

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda p: p.stem)
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
