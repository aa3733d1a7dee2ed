# SPDX-License-Identifier: Apache-2.0
"""Checks of the packages to publish. Prints a line for each and ends with `N passed, N failed`.

    python scripts/check_packaging.py [--kernels FOLDER]

1. The wheel's top level is exactly `vtprune`, `vtprune_kernels` and the dist-info, and no file is missing or extra.
2. From the repository root, the Hugging Face package `kernels` is importable: the folder `kernels/` does not shadow it.
3. There is no `kernels/__init__.py`, and no test package called `kernels`.
4. `kernels/build.toml` satisfies the schema of Hugging Face's kernel-builder in its newest edition, and
   `get_local_kernel` loads the result of `scripts/build_kernel.py`, which computes the same as the package.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Import package -> folder in the repository.
SOURCES = {"vtprune": "vtprune", "vtprune_kernels": "kernels/torch-ext/vtprune_kernels"}
# Data files of the packages, by folder.
DATA = {
    "vtprune": ("py.typed",),
    "vtprune/refvlm/weights": ("*",),
    "vtprune/refvlm/weights_qwen2_5_vl": ("*",),
}


def expected_files() -> set[str]:
    """Expected paths in the wheel: every Python file of both packages, and their data files."""
    files = set()
    for package, folder in SOURCES.items():
        for path in (ROOT / folder).rglob("*.py"):
            files.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    for folder, patterns in DATA.items():
        for pattern in patterns:
            files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern) if path.is_file()}
    return files


def packages(root: Path = ROOT) -> set[str]:
    """Dotted names of all package folders in the tree."""
    found = set()
    for package, folder in SOURCES.items():
        for init in (root / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(root / folder).parts
            found.add(".".join((package, *inner)))
    return found


def wheel_problems(names: list[str], expected: set[str]) -> list[str]:
    """Problems of a wheel with the files `names`."""
    problems = []
    files = {name for name in names if not name.endswith("/")}
    tops = {name.split("/")[0] for name in files}
    wanted = {name.split("/")[0] for name in expected}
    meta = {top for top in tops if top.startswith("vtprune-") and top.endswith(".dist-info")}
    if tops - meta != wanted:
        problems.append(f"top level is {sorted(tops - meta)}, expected {sorted(wanted)}")
    if len(meta) != 1:
        problems.append(f"dist-info folders are {sorted(meta)}, expected one of vtprune")
    missing = sorted(expected - files)
    if missing:
        problems.append(f"{len(missing)} files are missing: {', '.join(missing[:8])}")
    extra = sorted(name for name in files - expected if name.split("/")[0] not in meta)
    if extra:
        problems.append(f"{len(extra)} files are not expected: {', '.join(extra[:8])}")
    return problems


def check_wheel() -> list[str]:
    """Builds the wheel from a copy of the sources, free of earlier build files, and checks its contents."""
    expected = expected_files()
    problems = [f"{package} holds no Python file" for package in SOURCES if f"{package}/__init__.py" not in expected]
    if not any(name.endswith(".safetensors") for name in expected):
        problems.append("the weights of the built-in model are not in the tree")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        copy.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, copy)
        for source in SOURCES.values():
            shutil.copytree(ROOT / source, copy / source, ignore=shutil.ignore_patterns("__pycache__"))
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
        build = subprocess.run([*pip, str(copy)], capture_output=True, text=True, check=False)
        if build.returncode:
            return [*problems, f"pip wheel failed: {build.stderr.strip()[-800:]}"]
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            return [*problems, f"pip wheel made {len(wheels)} wheels, expected one"]
        with zipfile.ZipFile(wheels[0]) as archive:
            return problems + wheel_problems(archive.namelist(), expected)


def check_kernels_import(folder: str | None, root: Path = ROOT) -> list[str]:
    """Imports the Hugging Face package from the repository root; `folder` is a separate installation of it."""
    code = "import transformers; from kernels import get_kernel"
    if folder:  # after the working directory, like an installed package
        code = f"import sys; sys.path.append({str(Path(folder).resolve())!r}); {code}"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    return [] if run.returncode == 0 else [f"Hugging Face kernels cannot be imported: {run.stderr.strip()[-400:]}"]


def check_no_shadow(root: Path = ROOT) -> list[str]:
    """Looks for packages that would be imported as `kernels`."""
    places = [root / "kernels" / "__init__.py", root / "tests" / "kernels" / "__init__.py"]
    return [f"{path.relative_to(root)} exists and shadows Hugging Face kernels" for path in places if path.exists()]


_LOAD_KERNEL = """
import pathlib, sys
sys.path[:0] = [{scripts!r}, {sources!r}]
sys.path.append({extra!r})
import build_kernel
from kernels import get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
out = pathlib.Path({out!r})
builds = build_kernel.build(out)
Build.open(out)
for path in builds:
    Metadata.read_from_file(path / "metadata.json").digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, path))
import torch, vtprune_kernels
loaded = get_local_kernel(out, backend="cpu")
assert str(out) in loaded.__file__ and loaded.__all__ == vtprune_kernels.__all__, loaded
torch.manual_seed(0)
rows, ends, budgets = torch.randn(50, 8), torch.tensor([0, 20, 50]), torch.tensor([5, 7])
found = loaded.weighted_farthest_point(rows, torch.ones(50), ends, budgets)
assert found.equal(vtprune_kernels.weighted_farthest_point(rows, torch.ones(50), ends, budgets)), found
"""


def check_kernel_build(folder: str | None) -> list[str]:
    """Builds the kernel's repository and loads it with Hugging Face kernels, installed here or in `folder`."""
    with tempfile.TemporaryDirectory() as out:
        names = {"scripts": str(ROOT / "scripts"), "sources": str(ROOT / "kernels" / "torch-ext")}
        code = _LOAD_KERNEL.format(**names, out=f"{out}/kernel", extra=str(Path(folder).resolve()) if folder else "")
        run = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=False)
    if run.returncode:
        return [f"the kernel does not load: {run.stderr.strip()[-400:]}"]
    # The builder accepts older editions of build.toml, but reports them on its output.
    return [f"build.toml: {run.stderr.strip()[-400:]}"] if "legacy" in run.stderr + run.stdout else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", metavar="FOLDER", help="folder of Hugging Face kernels, if not installed here")
    args = parser.parse_args()
    checks: dict[str, Callable[[], list[str]]] = {
        "wheel": check_wheel,
        "kernels import": lambda: check_kernels_import(args.kernels),
        "no shadow": check_no_shadow,
        "kernel build": lambda: check_kernel_build(args.kernels),
    }
    failed = 0
    for name, check in checks.items():
        problems = check()
        failed += bool(problems)
        print(f"{name}: {'; '.join(problems) or 'ok'}", flush=True)
    print(f"packaging: {len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
