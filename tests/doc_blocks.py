# SPDX-License-Identifier: Apache-2.0
"""Code blocks of documents, and the rules by which tests run them: `docs/extend/docs.md` states the same in words."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import vtprune

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.S | re.M)
_STRING = re.compile(r"""(["'])([\w-][\w.-]*/[\w-][\w.-]*)\1""")
_MEDIA = ("image/", "text/", "application/", "video/")
_PLACEHOLDER = re.compile(r"[A-Z]+(_[A-Z]+)*")
# Programs whose own checks are elsewhere; their lines are not run.
KNOWN = {"curl", "git", "mkdir", "tr"}
# Commands of vtprune that are run, with arguments that keep them short. The others are parsed.
RUN = {
    "methods": [],
    "inspect": [],
    "demo": ["--repeats", "1"],
    "run": ["--repeats", "1", "--max-new-tokens", "2", "--device", "cpu"],
    "compare": ["--repeats", "1", "--methods", "uniform", "--device", "cpu"],
    "tune": ["--trials", "1", "--device", "cpu"],
}


class Block(NamedTuple):
    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a document, with the line that each begins at."""
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 1) for m in _BLOCK.finditer(text)]


def offline(code: str, folder: Path) -> str:
    """Python code in which names of models on the hub are the path of a local folder."""

    def swap(match: re.Match[str]) -> str:
        name = match[2]
        return match[0] if name.startswith(_MEDIA) or Path(name).exists() else repr(str(folder))

    return _STRING.sub(swap, code)


def commands(scripts: list[str], cwd: Path) -> list[list[list[str]]]:
    """What shell blocks call, block by block: the words of each call, with variables, functions and loops worked out.

    The blocks run in one shell, in `cwd`, in which no program can be found: instead of running, calls are noted.
    """
    log = cwd / "calls.log"
    log.write_bytes(b"")
    note = f"{{ printf '%s\\0' \"$@\"; printf '\\n\\0'; }} >> {shlex.quote(str(log))}"
    lines = ["PATH=/nowhere", f"command_not_found_handle() {note}"]
    for script in scripts:
        shown = re.sub(r"<[a-z][a-z ]*>", "PLACEHOLDER", script).replace(".venv/bin/", "")
        lines += ["command_not_found_handle --next-block--", shown]
    text = "\n".join(lines)
    syntax = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert syntax.returncode == 0, syntax.stderr
    subprocess.run(["bash"], input=text, text=True, capture_output=True, check=False, cwd=cwd, timeout=60)
    found: list[list[list[str]]] = []
    for call in log.read_text(encoding="utf-8").split("\n\0")[:-1]:
        words = call.split("\0")[:-1]
        if words == ["--next-block--"]:
            found.append([])
        else:
            found[-1].append(words)
    return found


def check_command(words: list[str], folder: Path) -> list[str] | None:
    """Fails where a shown command cannot work; the arguments of a `vtprune` command that is to be run, else None."""
    program, *rest = words
    if program == "vtprune":
        return check_vtprune(rest, folder)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"make has no target {target}"
    elif program in ("python", "python3", ".venv/bin/python"):
        check_python(rest)
    elif program == "pytest":
        for path in (word for word in rest if word.startswith("tests")):
            assert (ROOT / path.split("::")[0]).exists(), path
    elif program == "pip":
        assert rest[0] == "install", words
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        extras = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
        for extra in re.findall(r"vtprune\[([\w,]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= set(re.findall(r"^(\w+) = ", extras, re.M)), extra
    elif program in ("lmms-eval", "accelerate"):
        for name in re.findall(r"(?:method|host)=(\w+)", " ".join(rest)):
            assert name in (*vtprune.methods.names(), "none"), f"there is no method {name}: {shlex.join(words)}"
    elif program == "transformers":
        assert importlib.util.find_spec(f"transformers.cli.{rest[0]}"), words
    else:
        assert program in KNOWN, f"{program} is not on the list of known programs: {shlex.join(words)}"
    return None


def check_vtprune(rest: list[str], folder: Path) -> list[str] | None:
    """The command line must parse; returned with placeholders replaced if it is one of those that are run."""
    from vtprune.cli import _parser

    arguments = list(rest)
    for index, word in enumerate(arguments[:-1]):
        value = arguments[index + 1]
        if word == "--model" and (_PLACEHOLDER.fullmatch(value) or re.fullmatch(r"[\w-]+/[\w.-]+", value)):
            arguments[index + 1] = str(folder)
        elif word in ("--image", "--images") and _PLACEHOLDER.fullmatch(value):
            arguments[index + 1] = "photos"
    _parser().parse_args(arguments)
    return [*arguments, *RUN[arguments[0]]] if arguments[0] in RUN else None


def check_python(rest: list[str]) -> None:
    """The script or module must exist, and know every option that is shown."""
    if rest[0] == "-m":
        path, options = ROOT / f"{rest[1].replace('.', '/')}.py", rest[2:]
        if not path.exists():
            path = path.with_suffix("") / "__main__.py"
        if rest[1].split(".")[0] not in ("benchmarks", "vtprune", "tests"):
            assert importlib.util.find_spec(rest[1]), rest
            return
    else:
        path, options = ROOT / rest[0], rest[1:]
        if rest[0] == "serve_pruned.py":  # written by the reader, in the block above
            return
    assert path.exists(), f"there is no {path.relative_to(ROOT)}"
    source = path.read_text(encoding="utf-8")
    for option in (word.split("=")[0] for word in options if word.startswith("--")):
        assert f'"{option}"' in source, f"{path.relative_to(ROOT)} has no option {option}"


def run_python(block: Block, scope: dict[str, Any], folder: Path, page: str) -> None:
    """Runs a block in the session of its page; a traceback names the page and its line there."""
    code = "\n" * block.line + offline(block.code, folder)
    exec(compile(code, page, "exec"), scope)
