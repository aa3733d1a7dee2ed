# SPDX-License-Identifier: Apache-2.0
"""Every method is one file or one folder, and names its paper."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from vtprune import methods

FOLDER = Path(methods.__file__).parent
# From the files, not from the registry: other tests register methods of their own.
FILES = {f for f in FOLDER.rglob("*.py") if any(line.startswith("@register(") for line in f.read_text().splitlines())}


def test_there_is_a_file_for_every_method():
    classes = [methods.get(name) for name in methods.names()]
    shipped = [cls for cls in classes if cls.__module__.startswith(f"{methods.__name__}.")]
    assert {Path(inspect.getfile(cls)) for cls in shipped} == FILES and len(shipped) == len(FILES) >= 16


@pytest.mark.parametrize(
    "file", sorted(FILES), ids=lambda file: file.parent.name if file.stem == "method" else file.stem
)
def test_its_docstring_names_the_paper_or_says_that_there_is_none(file: Path):
    (name,) = [n for n in methods.names() if Path(inspect.getfile(methods.get(n))) == file]
    doc = methods.get(name).__doc__ or ""
    assert "arXiv" in doc or "No paper" in doc
