# SPDX-License-Identifier: Apache-2.0
"""Weights and presets are safetensors or JSON, so that loading never runs code."""

from __future__ import annotations

import ast
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import vtprune
from vtprune.errors import InputError
from vtprune.refvlm import loading

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted([*(ROOT / "vtprune").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
READERS = {f"{module}.load" for module in ("torch", "np", "numpy", "yaml")} | {"yaml.unsafe_load", "eval", "exec"}


class Trap:
    """A malicious object: unpickling it runs a function."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder of conftest.py that a test may modify."""
    place = tmp_path / "model"
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).hardlink_to(file)
    return place


def offences(tree: ast.AST) -> Iterator[str]:
    """Imports and calls that read pickles, evaluate text, or allow code that comes with a model."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        yield from (name for name in names if name.split(".")[0] in UNPICKLERS)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in READERS:
                yield ast.unparse(node.func)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg in ("trust_remote_code", "allow_pickle") and value is not False:
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
                if keyword.arg == "use_safetensors" and value is not True:
                    yield f"use_safetensors={ast.unparse(keyword.value)}"


def test_the_package_unpickles_nothing() -> None:
    found = {str(f.relative_to(ROOT)): list(offences(ast.parse(f.read_text(encoding="utf-8")))) for f in SHIPPED}
    assert len(found) > 60
    # Kernels are code: only the repository that VTPRUNE_KERNELS names is trusted.
    assert found.pop("vtprune/core/hub_kernels.py") == ["trust_remote_code=[on_hub[1]]"]
    assert {file: what for file, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=args.trust)",
        "AutoModel.from_pretrained(name, use_safetensors=None)",
        "eval(text)",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert list(offences(ast.parse(line)))


def test_every_model_is_asked_for_safetensors() -> None:
    """Every `from_pretrained` of a model passes `use_safetensors`; without it, pickles are a fallback."""
    calls = [
        (file.name, node)
        for file in SHIPPED
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
    ]
    models = [
        (file, {keyword.arg for keyword in node.keywords})
        for file, node in calls
        if not any(word in ast.unparse(node.func) for word in ("Config", "Processor", "Tokenizer"))
    ]
    assert models and all("use_safetensors" in arguments for _, arguments in models), models


def test_shipped_files_are_not_pickles() -> None:
    kinds = {file.suffix for file in (ROOT / "vtprune").rglob("*") if file.is_file() and "__pycache__" not in str(file)}
    assert kinds <= {".py", ".typed", ".md", ".json", ".safetensors", ".jinja", ".txt", ".png"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt"])
def test_a_folder_with_pickled_weights_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(InputError) as refusal:
        loading.model_and_processor(str(folder))
    assert name in str(refusal.value) and "safetensors" in str(refusal.value)
    assert not (tmp_path / "sprung").exists()


def test_pickled_weights_that_torch_would_accept_are_refused_too(folder: Path) -> None:
    """A harmless pickled state dict, which transformers alone would read, is refused."""
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
        loading.model_and_processor(str(folder))


def test_pickles_beside_safetensors_are_not_read(folder: Path, tmp_path: Path) -> None:
    """Pickles beside safetensors, as in checkpoints of a training run, are ignored."""
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    model, _ = loading.model_and_processor(str(folder))
    assert model is not None and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_does_not_run(folder: Path, tmp_path: Path, known: bool) -> None:
    """A known architecture is loaded by transformers' own code; an unknown one is refused."""
    mark = tmp_path / "ran"
    (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n", encoding="utf-8")
    for name in ("config.json", "processor_config.json"):
        text = json.loads((folder / name).read_text(encoding="utf-8"))
        text["auto_map"] = {
            "AutoConfig": "mine.Config",
            "AutoModelForImageTextToText": "mine.Model",
            "AutoProcessor": "mine.Processor",
        }
        if not known and name == "config.json":
            text["model_type"] = "nobody_knows"
        (folder / name).unlink()
        (folder / name).write_text(json.dumps(text), encoding="utf-8")
    if known:
        model, _ = loading.model_and_processor(str(folder))
        assert type(model).__module__.startswith("transformers.")
    else:
        with pytest.raises(InputError):
            loading.model_and_processor(str(folder))
    assert not mark.exists()


def test_a_processor_that_transformers_does_not_know_is_named(folder: Path) -> None:
    """transformers makes a tokenizer of it, silently; the folder lacks no file."""
    text = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    (folder / "processor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(text | {"processor_class": "MyProcessor"}), "utf-8")
    with pytest.raises(InputError, match="gives a Tokenizer.*, which has no image processor"):
        loading.model_and_processor(str(folder))


def test_a_training_run_goes_on_from_safetensors(tmp_path: Path) -> None:
    from tools.refvlm import checkpoint

    def run(steps: int, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            (module(torch.full((2, 3), 1.0 + step)) ** 2).sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    first, second = (torch.nn.Linear(3, 3) for _ in range(2))
    one, two = (torch.optim.AdamW(m.parameters(), lr=0.1, betas=(0.9, 0.98)) for m in (first, second))
    run(3, first, one)
    checkpoint.save(tmp_path / "run.safetensors", first, [one], 3)
    weights, states, step = checkpoint.load(tmp_path / "run.safetensors", torch.device("cpu"))
    second.load_state_dict(weights)
    two.load_state_dict(states[0])
    run(2, first, one)
    run(2, second, two)
    assert step == 3 and torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    "load", [vtprune.methods.VFlowOpt.load, lambda file: vtprune.methods.Debiased(curve=str(file))]
)
def test_presets_are_json(tmp_path: Path, load: Callable[[Path], object]) -> None:
    trap = tmp_path / "preset.json"
    trap.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(vtprune.MethodError):
        load(trap)
    assert not (tmp_path / "sprung").exists()
