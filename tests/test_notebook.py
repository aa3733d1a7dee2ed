# SPDX-License-Identifier: Apache-2.0
"""The notebook runs from top to bottom and prints its stored output."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the packages of notebooks are not installed")
from nbclient import NotebookClient  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "examples" / "notebook.ipynb"


def printed(notebook: Any) -> list[str]:
    """Standard output of each code cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in cells]


@pytest.fixture(scope="module")
def stored() -> Any:
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_runs_and_prints_what_is_stored(stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fresh = copy.deepcopy(stored)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert printed(fresh) == printed(stored)
    assert any("image/png" in out.get("data", {}) for cell in fresh.cells for out in cell.get("outputs", []))


def test_it_is_small_and_names_no_folder_of_this_machine(stored: Any) -> None:
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    assert str(ROOT) not in text and "site-packages" not in text
    assert all(out.output_type != "error" for cell in stored.cells for out in cell.get("outputs", []))
