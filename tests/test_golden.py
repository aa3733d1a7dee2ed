# SPDX-License-Identifier: Apache-2.0
"""Every golden file against the method that its name begins with.

`NAME_case.npz` is checked by `golden_checks.NAME.check(data)`. `--golden DIR` names a folder.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--golden")
    folders = [Path(name) for name in given or [SHARED / "golden", SHARED / "golden-2"]]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.glob("*.npz"))
    names = " and ".join(map(str, folders))
    reason = f"no golden data: {names} absent or without a .npz file (--golden DIR names another folder)"
    cases = [pytest.param(file, id=file.stem) for file in files]
    metafunc.parametrize("file", cases or [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="absent")])


def test_golden_data_is_reproduced(file: Path) -> None:
    method = file.stem.rpartition("_")[0] or file.stem
    if importlib.util.find_spec(f"golden_checks.{method}") is None:
        pytest.fail(f"{file.name} has no check: tests/golden_checks/{method}.py is missing")
    with np.load(file) as archive:
        data = {name: archive[name] for name in archive.files}
    assert data, f"{file.name} holds no arrays"
    importlib.import_module(f"golden_checks.{method}").check(data)
