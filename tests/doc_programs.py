# SPDX-License-Identifier: Apache-2.0
"""What programs do that shell blocks call: they run, in a short form where the shown one takes long.

`docs/extend/docs.md` states the rules in words. Everything here runs in a process of its own (`doc_processes.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import doc_installs
import doc_servers
from doc_checks import ROOT, Checked, lmms_arguments, runs_here, vllm_arguments
from doc_python import checkout, copy, execute, notes, python, run_module, run_pytest, run_vtprune


def call(program: str, words: list[str]) -> int:
    """Runs a called program and notes how it went; its exit status."""
    note = {"shown": [program, *words], "status": 1}
    if program != "make":  # whose recipes call stand-ins; what other programs call is their own affair
        os.environ["PATH"] = os.environ["DOCS_PATH"]
    try:
        note["status"] = _RULES[program.removesuffix("3")](words) or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        note["status"] = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Checked as checked:
        note |= {"status": 0, "only_checked": str(checked)}
    finally:
        note["server"] = doc_servers.started()
        with (notes() / "calls.jsonl").open("a") as log:
            log.write(json.dumps(note) + "\n")
    return note["status"]


def _make(words: list[str]) -> int:
    """The recipe of the target, with an environment that counts as made, whose Python is the stand-in."""
    os.chdir(checkout())
    text = Path("Makefile").read_text(encoding="utf-8")
    made = notes() / "venv"
    (made / "bin").mkdir(parents=True, exist_ok=True)
    if not (made / "bin" / "python").exists():
        (made / "bin" / "python").symlink_to(Path(os.environ["DOCS_BIN"], "python"))
    for stamp in re.findall(r"\$\(\w*VENV\)/([.\w-]+)$", text, re.M):
        (made / stamp).touch()
    places = [f"{name}={made}" for name in re.findall(r"^(\w*VENV) \?=", text, re.M)]
    return execute(["make", *words, *places])


def _git(words: list[str]) -> int:
    """A clone of this repository into a folder that is named."""
    if words[0] != "clone" or len(words) < 3 or not words[1].startswith(("PLACEHOLDER", "https://")):
        raise SystemExit(f"only clones of this repository are run: git {' '.join(words)}")
    if not (ROOT / ".git").exists():
        raise Checked("git")
    if (notes() / "copied").exists():  # the page has used the copy so far
        (notes() / "copied").unlink()
        shutil.rmtree(Path(os.environ["DOCS_SESSION"], "vtprune"))
    os.environ |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    status = execute(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", *words[2:]])
    if status == 0:
        copy(Path(words[2]))  # with what is not yet committed
    return status


def _pip(words: list[str]) -> int:
    if any(word in (".", "-r", "-e", "-c") or word.startswith(".[") for word in words):
        os.chdir(checkout())
    elif any(word.startswith("./") for word in words):
        checkout()
    return run_module("pip", doc_installs.arguments(words, notes()))


def _lmms_eval(words: list[str]) -> int:
    """Two questions of a local task, about a tiny random model; elsewhere the plug-in reads the arguments."""
    short = lmms_arguments(words, notes())
    if not runs_here("lmms_eval"):
        raise Checked("lmms_eval")
    os.chdir(checkout())
    return run_module("lmms_eval", short)


def _accelerate(words: list[str]) -> int:
    """`accelerate launch OPTIONS -m lmms_eval WORDS`; with one process the program is run without it."""
    at = words.index("-m")
    if words[0] != "launch" or words[at + 1] != "lmms_eval":
        raise SystemExit(f"only launches of lmms_eval are run: accelerate {' '.join(words)}")
    if "1" in words[:at]:
        return _lmms_eval(words[at + 2 :])
    short = lmms_arguments(words[at + 2 :], notes())
    if not runs_here("lmms_eval"):
        raise Checked("lmms_eval")
    os.chdir(checkout())
    return execute([sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[: at + 2], *short])


def _transformers(words: list[str]) -> int:
    def run(rest: list[str]) -> int:
        return run_module("transformers.cli.transformers", rest)

    return doc_servers.start("transformers", run, words) if words[0] == "serve" else run(words)


def _vllm(words: list[str]) -> int:
    vllm_arguments(words)
    doc_servers.pretend(words)
    raise Checked("vllm")


def _curl(words: list[str]) -> int:
    return execute(["curl", "--fail-with-body", "-sS", *doc_servers.redirected(words)])


_RULES: dict[str, Callable[[list[str]], int]] = {
    "accelerate": _accelerate,
    "curl": _curl,
    "git": _git,
    "lmms-eval": _lmms_eval,
    "make": _make,
    "pip": _pip,
    "pytest": run_pytest,
    "python": python,
    "transformers": _transformers,
    "vllm": _vllm,
    "vtprune": run_vtprune,
}
