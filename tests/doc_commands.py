# SPDX-License-Identifier: Apache-2.0
"""Checks of the commands in shell blocks of documents: programs, files, targets, extras and options must exist.

Nothing is run: bash expands a script's variables, functions and loops, and records every program instead of
starting it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement

from vtprune.cli.main import build_parser
from vtprune.core import default_method
from vtprune.integrations.lmms_eval import options
from vtprune.integrations.vllm import settings

ROOT = Path(__file__).resolve().parent.parent
# Programs are not on the PATH, so that bash hands each call to this function; `cd` and `.` would look for real files.
_RECORD = """
command_not_found_handle() { printf '%s\\0' "$@" $'\\n' >> "$CALLS"; }
cd() { :; }
.() { :; }
PATH=/nonexistent
"""


class WrongCommand(Exception):
    """A documented command that cannot work; the message names the part that does not exist."""


def calls(script: str) -> list[list[str]]:
    """The program calls of a shell script, words expanded, in order.

    Raises:
        WrongCommand: Bash cannot read the script.
    """
    script = re.sub(r"\.venv[\w-]*/bin/", "", script.replace("<this repository>", "REPOSITORY"))
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "calls"
        record.touch()
        command, env = ["/bin/bash", "-c", _RECORD + script], {"CALLS": str(record)}
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise WrongCommand(f"bash: {done.stderr.strip()}")
        return [call.split("\0") for call in record.read_text().split("\0\n\0")[:-1]]


def check(words: list[str], page: str = "") -> None:
    """Checks one call; `page` is the text around it, which may say "Save this as `NAME`".

    Raises:
        WrongCommand: The program, or a file, target, extra or option that the call names, does not exist.
    """
    program, rest = words[0], words[1:]
    if program not in _CHECKS:
        raise WrongCommand(f"{program}: documents use only {', '.join(sorted(_CHECKS))}")
    _CHECKS[program](rest, re.findall(r"[Ss]ave this as\s+`([\w.]+)`", page))


def _nothing(words: list[str], saved: list[str]) -> None:
    """Accepts system programs with any options."""


def _vtprune(words: list[str], saved: list[str]) -> None:
    try:
        build_parser().parse_args(words)
    except SystemExit as error:
        if error.code:
            raise WrongCommand(f"vtprune: {error.code}") from error


def _python(words: list[str], saved: list[str]) -> None:
    if words[0] == "-m" and words[1] in _CHECKS:
        return _CHECKS[words[1]](words[2:], saved)
    if words[0] == "-m":
        place = ROOT / words[1].replace(".", "/")
        files = (place.with_suffix(".py"), place / "__main__.py")
        path, rest = next((file for file in files if file.exists()), place), words[2:]
    else:
        path, rest = ROOT / words[0], words[1:]
    if words[0] in saved:
        return None
    if not path.is_file():
        raise WrongCommand(f"python: there is no {path.relative_to(ROOT)}")
    source = path.read_text(encoding="utf-8")
    for option in (word.split("=")[0] for word in rest if word.startswith("--")):
        if f'"{option}"' not in source:
            raise WrongCommand(f"python: {path.relative_to(ROOT)} has no option {option}")


def _pytest(words: list[str], saved: list[str]) -> None:
    for word in words:
        if "/" in word and not (ROOT / word.split("::")[0]).exists():
            raise WrongCommand(f"pytest: there is no {word}")


def _make(words: list[str], saved: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        if "=" not in word and word not in targets:
            raise WrongCommand(f"make: the Makefile has no target {word}")


def _pip(words: list[str], saved: list[str]) -> None:
    if words[0] != "install":
        raise WrongCommand(f"pip: only installations are shown, not {words[0]}")
    # Parsed without tomllib, which Python 3.10 lacks.
    block = re.search(
        r"^\[project\.optional-dependencies\]\n(.*?)^\[", (ROOT / "pyproject.toml").read_text(), re.S | re.M
    )
    known = re.findall(r"^([\w-]+) = ", block[1], re.M)
    for before, word in zip(words, words[1:], strict=False):
        if before == "-r" and not (ROOT / word).exists():
            raise WrongCommand(f"pip: there is no {word}")
        if word.startswith("-") or before in ("-r", "-c"):
            continue
        name = re.sub(r"^\./?(vtprune)?", "vtprune", word)  # a checkout, or the folder that holds it
        required = Requirement(name)
        if required.name == "vtprune" and required.extras - set(known):
            raise WrongCommand(f"pip: vtprune has no extra {', '.join(required.extras - set(known))}")


def _lmms_eval(words: list[str], saved: list[str]) -> None:
    """Parses `--model_args` with the plug-in's own functions."""
    given = dict(zip(words, words[1:], strict=False))
    if missing := {"--model", "--model_args", "--tasks"} - set(given):
        raise WrongCommand(f"lmms-eval: shown without {', '.join(sorted(missing))}")
    values = dict(part.split("=", 1) for part in re.split(r",(?![^\[]*\])", given["--model_args"]))
    taken = ("pretrained", "method", "ratio", "keep", "mean_ratio", "square")
    read = {key: _value(text) for key, text in values.items()}
    name = values.get("method", default_method.NAME)
    options.method(name, {key: value for key, value in read.items() if key not in taken}, taken)
    options.budget(name, **{key: read[key] for key in ("ratio", "keep", "mean_ratio") if key in read})
    if "--include_path" in given and not (ROOT / given["--include_path"]).is_dir():
        raise WrongCommand(f"lmms-eval: there is no folder {given['--include_path']}")


def _accelerate(words: list[str], saved: list[str]) -> None:
    if "-m" not in words:
        raise WrongCommand("accelerate: expected `launch ... -m lmms_eval ...`")
    _python(words[words.index("-m") :], saved)


def _vllm(words: list[str], saved: list[str]) -> None:
    """Parses the `vtprune` part of `--additional-config` with the plug-in's own function."""
    if words[0] != "serve" or len(words) < 2 or words[1].startswith("-"):
        raise WrongCommand("vllm: expected `serve MODEL`")
    for option, value in zip(words, words[1:], strict=False):
        if option == "--additional-config":
            settings.parse(json.loads(value)[settings.KEY])


def _value(text: str) -> object:
    """Parses a value as lmms-eval does: numbers, lists and booleans, otherwise text."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


_CHECKS: dict[str, Callable[[list[str], list[str]], None]] = {
    **dict.fromkeys(("base64", "cat", "curl", "git", "mkdir", "sleep", "tr", "venv"), _nothing),
    **dict.fromkeys(("python", "python3"), _python),
    **dict.fromkeys(("lmms-eval", "lmms_eval"), _lmms_eval),
    "accelerate": _accelerate,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "vllm": _vllm,
    "vtprune": _vtprune,
}
