# SPDX-License-Identifier: Apache-2.0
"""Workflows call only existing targets and scripts, and their scripts work. `make workflows` runs linters on them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import build_kernel, build_space, first_failure, release_notes, unpin

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_call_targets_and_scripts_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    called = set()
    for path in WORKFLOWS:
        text = path.read_text()
        for arguments in re.findall(r"^\s*(?:- run: |run: \|\n\s*.*\n\s*)?make ([^\n|]*)", text, re.M):
            called |= {word for word in arguments.split() if re.fullmatch(r"[a-z][\w-]*", word)}
        for line in re.findall(r"run: make ([^\n]*)", text):
            called |= {word for word in line.split() if re.fullmatch(r"[a-z][\w-]*", word)}
        matrix = re.search(r"target: \[(.*)\]", text)
        called |= set(matrix[1].split(", ")) if matrix else set()
        for script in re.findall(r"scripts/[\w.]+", text):
            assert (ROOT / script).is_file(), f"{path.name} calls {script}"
    assert {"test", "docs", "test-oldest", "test-newest", "dist-check", "audit", "soak"} <= called <= targets


def test_all_places_agree_on_the_version():
    assert release_notes.problems(None) == []


def test_a_tag_of_another_version_is_refused(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts/release_notes.py"), "--check", "v9.9.9"], capture_output=True, text=True
    )
    assert run.returncode == 1 and "the tag is v9.9.9" in run.stdout


def test_pins_are_taken_out_and_bounds_and_markers_stay():
    text = (
        "# a==1 comment\n-c torch.txt\nnumpy==2.4.6\nfilelock==3.29.0,<4.3\nfastapi[standard]==0.1\n"
        'triton==3.7.1; sys_platform == "linux"\n'
    )
    wanted = '# a==1 comment\n-c torch.txt\nnumpy\nfilelock<4.3\nfastapi[standard]\ntriton; sys_platform == "linux"\n'
    assert unpin.unpin(text) == wanted
    for path in (ROOT / "requirements").glob("*.txt"):
        lines = [line for line in unpin.unpin(path.read_text()).splitlines() if not line.startswith("#")]
        assert not [line for line in lines if "==" in line.split(";")[0]]


def test_bounds_of_a_package_are_constraints():
    asked = ["a[x]<2", "torch==1.2+cpu", "torchvision", 'b>1; extra == "z"', 'c==3; python_version < "4"']
    assert unpin.bounds(asked) == ["a<2", "torch==1.2", 'c==3 ; python_version < "4"']


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        (
            "ok\n== FAILURES ==\nE   assert 1\n" + "x\n" * 99 + "FAILED tests/test_a.py::test_b - assert 1\n",
            "test_a.py",
        ),
        ("Collecting\nERROR: No matching distribution found for vllm\nmake: *** [x] Error 1\n", "No matching"),
        ("Traceback (most recent call last):\n  File x\nImportError: no\n", "ImportError"),
        ("1\n2\n3\n", "3"),
        ("", "empty"),
    ],
)
def test_the_first_failure_of_a_log_is_found(log, shown):
    text = first_failure.excerpt(log) or "the log is empty"
    assert shown in text and len(text.splitlines()) < 50


@pytest.mark.parametrize(("number", "command"), [("", "issue create"), ("17", "issue comment 17")])
def test_a_broken_night_becomes_one_issue(tmp_path, number, command):
    """A failed nightly run opens one issue or comments on it; a stand-in for `gh` records the call."""
    stand_in = tmp_path / "gh"
    stand_in.write_text(
        f'#!/bin/sh\nif [ "$2" = list ]; then echo "{number}"; exit; fi\n'
        f'echo "$@" > {tmp_path}/called\nfor last; do :; done; cat "$last" >> {tmp_path}/called\n'
    )
    stand_in.chmod(0o755)
    log = tmp_path / "log"
    log.write_text("E   a ``` b\nFAILED tests/test_a.py::test_b\n")
    env = os.environ | {"GH": str(stand_in), "RUN": "https://example.org/run/1"}
    subprocess.run([str(ROOT / "scripts/open_issue.sh"), "test-newest", str(log)], check=True, env=env)
    called = (tmp_path / "called").read_text()
    assert called.startswith(command) and "tests/test_a.py::test_b" in called and "example.org/run/1" in called
    assert "````text" in called  # a fence that the log cannot close


def test_the_kernel_is_laid_out_as_the_hub_has_it(tmp_path):
    builds = build_kernel.build(tmp_path / "kernel")
    assert [path.name for path in builds] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"]
    sources = ROOT / "kernels" / "torch-ext" / "vtprune_kernels"
    for path in builds:
        copied = {file.relative_to(path) for file in path.rglob("*.py")}
        assert copied == {file.relative_to(sources) for file in sources.rglob("*.py")}


def test_the_space_asks_for_the_wheel_beside_it(tmp_path):
    wheel = tmp_path / "vtprune-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    build_space.build(wheel, tmp_path / "space")
    assert f"./{wheel.name}" in (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert (tmp_path / "space" / "app.py").is_file() and (tmp_path / "space" / wheel.name).is_file()


def test_the_lock_agrees_with_the_pins_and_names_no_index() -> None:
    folder = ROOT / "requirements"
    locked = (folder / "locked.txt").read_text(encoding="utf-8")
    names = {line.split(";")[0].strip().lower().replace("_", "-") for line in locked.splitlines()}
    for file in ("torch.txt", "runtime.txt", "test.txt"):
        for line in (folder / file).read_text(encoding="utf-8").splitlines():
            if "==" in line and not line.startswith("#"):
                pin = re.sub(r"\[.*?\]", "", line.split(";")[0]).strip().lower().replace("_", "-")
                assert pin in names, f"{pin}: run `make lock`"
    assert "://" not in locked and "--" not in re.sub(r"^#.*$", "", locked, flags=re.M)
