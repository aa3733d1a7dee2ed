# SPDX-License-Identifier: Apache-2.0
"""The README: its code runs, its renderer works, its links resolve; `test_report.py` compares its tables."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from benchmarks import report_readme as renderer
from scripts import draw_badges as badges

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_python_blocks_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    """The Python blocks run in one session, print the report, and leave no hooks on the model."""
    monkeypatch.chdir(tmp_path)  # a picture is written
    scope: dict = {}
    blocks = _blocks("python")
    assert len(blocks) == 2
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), scope)
    finally:
        registry = importlib.import_module("vtprune.core.registry")
        registry._METHODS.pop("norm", None)
    assert "144 -> 14" in capsys.readouterr().out
    assert scope["patch"].last.tokens == (144, 14)
    # transformers leaves hooks of its own on a model that has run
    modules = list(scope["model"].modules())
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("vtprune")]


def test_ten_lines_are_enough():
    """The first example and the method of one's own take at most ten lines of code each."""
    first, own = _blocks("python")
    code = [line for line in first.splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) <= 10
    method = own[own.index("@vtprune") : own.index("with vtprune")]
    assert len([line for line in own.splitlines() if line.strip()]) <= 10 and method.count("def ") == 1


def test_badges_say_what_the_package_does():
    for name, value in badges.facts().items():
        assert (badges.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == badges.badge(name, value)
        assert f"docs/badges/{name}.svg" in README
    about = importlib.metadata.metadata("vtprune")
    assert about["Requires-Python"] == badges.facts()["python"]


def test_both_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", "\n".join(_blocks("bash")), re.M)
    assert commands == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in commands)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_it_stays_short():
    assert len(README.splitlines()) < 150


_RESULTS = {
    "accuracy.json": {
        "questions": "200 questions on held-out scenes",
        "unpruned": {"right": 190, "total": 200, "visual_tokens": 144},
        "rows": [
            {"method": "b", "ratio": 0.1, "kept": 14, "mean_tokens": 14, "right": 150, "total": 200},
            {"method": "late", "ratio": 0.1, "kept": 14, "mean_tokens": 80, "right": 160, "total": 200},
            {"method": "late", "mean_ratio": 0.2, "refused": "too late"},
            {"method": "a", "ratio": 0.2, "kept": 29, "mean_tokens": 29, "right": 171, "total": 200},
        ],
        "versions": {"torch": "2.13.0"},
        "machine": "2 cores",
    },
    "families.json": {
        "rows": [
            {"model_type": "two", "laws": {"identity": True, "decode": False}, "tests": {"passed": 3, "failed": 1}},
            {"model_type": "one", "laws": {"identity": True, "decode": True}, "tests": {"passed": 4}},
            {"model_type": "three", "laws": {"identity": True}, "tests": {"passed": 2, "skipped": 2}},
        ],
        "versions": {"torch": "2.13.0"},
        "machine": "2 cores",
    },
}


def test_renderer_writes_the_numbers_of_the_results(tmp_path):
    for name, data in _RESULTS.items():
        (tmp_path / name).write_text(json.dumps(data))
    empty = (
        "<!-- begin:accuracy -->\nstale\n<!-- end:accuracy -->\n<!-- begin:families -->\n<!-- end:families -->\nrest"
    )
    text = renderer.render(empty, tmp_path)
    assert "stale" not in text and text.endswith("rest")
    assert "unpruned: 95.0 % with all 144 tokens" in text and "torch 2.13.0; 2 cores" in text
    assert "| method | mean cost 0.2 | mean cost 0.1 |" in text
    rows = ("| `b` |  | 75.0 % (14) |", "| `a` | 85.5 % (29) |  |", "| `late` | not possible |  |")
    assert "\n".join(rows) in text
    assert "identity, decode; 9 tests passed, 1 failed, 2 skipped." in text
    assert "| all | 2 | `one`, `three` |" in text and "| all but decode | 1 | `two` |" in text
    assert renderer.render(text, tmp_path) == text


def test_renderer_admits_what_was_not_measured(tmp_path):
    assert "Not yet measured" in renderer.render("<!-- begin:accuracy -->\n<!-- end:accuracy -->", tmp_path)


@pytest.mark.parametrize("text", ["<!-- begin:accuracy -->", "<!-- begin:speed -->\n<!-- end:speed -->"])
def test_renderer_refuses_blocks_it_does_not_know(text, tmp_path):
    with pytest.raises(ValueError, match="README.md has a block"):
        renderer.render(text, tmp_path)
