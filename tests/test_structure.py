# SPDX-License-Identifier: Apache-2.0
"""Structure of the package: packages import alone, a user's code type-checks, CONTRIBUTING lists all folders."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vtprune
from scripts import check_laws_can_fail

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent.name for path in (ROOT / "vtprune").glob("*/__init__.py"))
PATH = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])

# Forks a process for each package, with torch and transformers (seconds to import) loaded but nothing of vtprune.
# `vtprune/__init__.py` is skipped: it imports most packages, in an order that could hide a circular import.
IMPORT_ALONE = """
import importlib, os, sys, types
import torch, transformers
for name in sys.argv[2:]:
    if os.fork() == 0:
        root = types.ModuleType("vtprune")
        root.__path__, root.__version__ = [sys.argv[1]], ""
        sys.modules["vtprune"] = root
        try:
            importlib.import_module(f"vtprune.{name}")
        except BaseException as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.wait()
"""

USER_FILE = """
from dataclasses import dataclass

import torch
import vtprune
from scripts import check_laws_can_fail
from typing_extensions import assert_type
from vtprune.methods import IWP, ScoreMethod, Tokens


@vtprune.methods.register("norm")
@dataclass
class Norm(ScoreMethod):
    power: float = 1.0

    def score(self, tokens: Tokens) -> torch.Tensor:
        return tokens.hidden.norm(dim=-1) ** self.power


def use(model: torch.nn.Module) -> str:
    assert_type(vtprune.methods.IWP(layer=2), IWP)
    assert_type(Norm(power=2.0), Norm)
    patch = vtprune.patch(model, ratio=0.1, method=Norm())
    assert patch.last is not None
    return patch.last.report()


"""


SHIPPED = [
    cls for cls in map(vtprune.methods.get, vtprune.methods.names()) if cls.__module__.startswith("vtprune.methods.")
]  # other tests register methods of their own


def alone(folder: Path, packages: list[str]) -> str:
    """Errors when each package is imported in a process of its own."""
    command = [sys.executable, "-c", IMPORT_ALONE, str(folder), *packages]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": PATH}, capture_output=True, text=True, check=True
    ).stdout


def test_every_package_imports_alone():
    assert {"core", "engine", "methods", "models", "report"} <= set(PACKAGES)
    assert alone(ROOT / "vtprune", PACKAGES) == ""


def test_a_circle_is_noticed(tmp_path):
    for name, code in (("a", "from ..b import y\nx = 1"), ("b", "from ..a import x\ny = 1"), ("c", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    found = alone(tmp_path, ["a", "b", "c"])
    assert re.findall(r"^(\w): ImportError", found, re.M) == ["a", "b"]


def type_check(code: str, folder: Path) -> str:
    """Output of mypy for a user's file, with the settings and the cache of `make types`."""
    file = folder / "user.py"
    file.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--no-pretty", "--no-error-summary", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> str:
    """Output of one mypy run over correct lines followed by wrong ones."""
    classes = [cls.__name__ for cls in SHIPPED]
    right = "".join(f"assert_type(vtprune.methods.{name}(), vtprune.methods.{name})\n" for name in classes)
    wrong = "# wrong\nIWP(layers=2)\nIWP(layer='two')\nvtprune.methods.Nothing\n"
    return type_check(USER_FILE + right + wrong, tmp_path_factory.mktemp("user"))


def test_a_type_checker_knows_every_method_and_the_report(checked):
    first_wrong = USER_FILE.count("\n") + len(SHIPPED) + 1
    lines = [int(line) for line in re.findall(r"user\.py:(\d+): error", checked, re.M)]
    assert [line for line in lines if line < first_wrong] == [], checked


def test_a_type_checker_notices_wrong_options(checked):
    assert 'Unexpected keyword argument "layers"' in checked
    assert 'has incompatible type "str"' in checked and 'has no attribute "Nothing"' in checked


def layout_rows(text: str) -> list[str]:
    """First cells of the table under "Layout"."""
    table = text.split("\n## Layout\n")[1].split("\n## ")[0]
    return [place for row in re.findall(r"^\| (.*?) \|", table, re.M) for place in re.findall(r"`([^`]+)`", row)]


def test_the_layout_table_names_every_folder_once():
    rows = layout_rows((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    made = {"build", "dist", "out"}
    top = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in made]
    folders = {f"{name}/" for name in top if not name.endswith(".egg-info") and name != "vtprune"}
    assert sorted(rows) == sorted(folders | {f"vtprune/{name}/" for name in PACKAGES} | {"vtprune/errors.py"})


def test_faults_of_the_laws_name_code_that_exists() -> None:
    """Every text that `scripts/check_laws_can_fail.py` replaces is still in its file."""
    stale = [f.what for f in check_laws_can_fail.FAULTS if f.old not in (ROOT / "vtprune" / f.file).read_text()]
    assert not stale


def _without_dtype(path: Path) -> list[str]:
    """Calls that create a tensor in torch's default dtype; `torch.full` with a whole number does not."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("dtype", None) for keyword in node.keywords):
            continue
        name = ast.unparse(node.func)
        whole = name == "torch.full" and not re.search(r"inf|nan|NEVER|\.\d| / ", ast.unparse(node.args[1]))
        if re.fullmatch(r"torch\.(zeros|ones|empty|rand|randn|linspace|eye|full)", name) and not whole:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_new_tensors_name_their_dtype() -> None:
    """A process may have another default dtype; `tests/laws/test_12_torch_settings.py` runs what a CPU can run."""
    files = [*(ROOT / "vtprune").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 200
    assert sum(map(_without_dtype, files), []) == []
