"""The notebook of examples/ runs, and is committed without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.pages import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "stream.ipynb"


def test_the_notebook_has_no_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DUET_EXAMPLE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(tmp_path))
    said = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    assert "the same ids and the same pixels, bit for bit" in said
    kinds = {key for cell in notebook.cells for output in cell.get("outputs", [])
             for key in output.get("data", {})}  # fmt: skip
    assert "image/png" in kinds
    first, last = (float(word) for word in said.split("loss ")[1].split(" at ")[0].split(" -> "))
    assert last < first
