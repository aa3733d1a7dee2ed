# SPDX-License-Identifier: Apache-2.0
"""`VTPRUNE_KERNELS`: the tensor operations come from a Kernel Hub repository where one is named.

The tests do not depend on the package `kernels`; `make guard` loads the repository with it. Here a stand-in loads the
module that the metadata names from a local folder, as that package does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import build_kernel

ROOT = Path(__file__).resolve().parent.parent
_STAND_IN = """
import importlib.util, json, sys
def get_local_kernel(path):
    folder = path / "build" / "torch-cpu"
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
def get_kernel(repo, version, trust_remote_code):
    raise RuntimeError(f"no network for {repo} {version} {trust_remote_code}")
"""
_PRUNE = """
import torch, vtprune
from vtprune import refvlm
model, processor = refvlm.load()
scene = refvlm.scenes.scene(7)
inputs = processor(images=scene.image, text=refvlm.prompt(scene.questions[0].text), return_tensors="pt")
for method in ("iwp", "divprune"):
    with vtprune.patch(model, keep=9, method=method) as patch:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    print(method, patch.last.kept[0].tolist())
import vtprune_kernels
print(vtprune_kernels.__file__)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    build_kernel.build(out)
    (out.parent / "kernels.py").write_text(_STAND_IN)
    return out


def _run(code: str, repository: Path, place: str | None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "VTPRUNE_KERNELS"}
    paths = [str(repository.parent), str(ROOT), str(ROOT / "kernels" / "torch-ext")]
    env |= {"PYTHONPATH": os.pathsep.join(paths)} | ({} if place is None else {"VTPRUNE_KERNELS": place})
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_operations_come_from_the_repository_and_choose_the_same(repository):
    own, hub = (_run(_PRUNE, repository, place) for place in (None, str(repository)))
    assert own.returncode == hub.returncode == 0, own.stderr + hub.stderr
    assert own.stdout.splitlines()[:2] == hub.stdout.splitlines()[:2]
    assert str(repository) in hub.stdout.splitlines()[2] and str(repository) not in own.stdout


@pytest.mark.parametrize(
    ("code", "place", "message"),
    [
        ("import vtprune", "nowhere", "is no folder; expected one, or OWNER/NAME@VERSION"),
        ("import vtprune", "owner/name@1", "no network for owner/name 1 ['owner/name']"),
        ("import vtprune", "/tmp", "cannot be loaded"),
        ("import vtprune_kernels, vtprune", None, "was imported before vtprune"),
    ],
)
def test_what_cannot_be_loaded_is_said(repository, code, place, message):
    run = _run(code, repository, place or str(repository))
    assert run.returncode == 1 and message in run.stderr.splitlines()[-1]
