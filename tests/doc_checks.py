# SPDX-License-Identifier: Apache-2.0
"""What is checked of shown commands before they are run, and instead of it where they cannot be."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = os.environ.get("VTPRUNE_DOCS") == "all"

# All that is only checked, and not run, by `tests/test_docs.py`: why, and what runs it. Nothing else may be.
ONLY_CHECKED = {
    "git": "there is no .git folder, or no git, so nothing can be cloned",
    "make": "make is not installed",
    "curl": "curl is not installed, or the server that it asks was only checked",
    "pytest": "files of tests that skip themselves where a package is missing, such as vLLM",
    "lmms_eval": "runs where lmms-eval is installed, with VTPRUNE_DOCS=all: `make eval` makes such an environment",
    "mkdocs": "runs where mkdocs is installed; `make docs` itself is the test of that block",
    "fastapi": "`transformers serve` runs where the packages of transformers[serving] are installed",
    "gradio": "the Space runs where gradio is installed; `make test-web` drives it in a browser",
    "vllm": "vLLM wants an environment of its own; `make test-vllm` serves with it where it is installed",
}
_PACKAGES = {
    "lmms_eval": ("lmms_eval",),
    "mkdocs": ("mkdocs",),
    "fastapi": ("fastapi", "uvicorn", "openai"),
    "gradio": ("gradio",),
}
PLACEHOLDER = re.compile(r"[A-Z]+(_[A-Z]+)*")


def runs_here(key: str) -> bool:
    """Whether what the key of `ONLY_CHECKED` names is run in this environment."""
    if key == "git":
        return shutil.which("git") is not None and (ROOT / ".git").exists()
    if key in ("pytest", "vllm") or (key == "lmms_eval" and not EVERYTHING):
        return False
    if key in _PACKAGES:
        return all(importlib.util.find_spec(name) for name in _PACKAGES[key])
    return shutil.which(key) is not None


class Checked(Exception):
    """The command is in order as far as that can be said without running it; its text is a key of `ONLY_CHECKED`."""

    def __init__(self, key: str) -> None:
        if key not in ONLY_CHECKED:
            raise AssertionError(f"{key} is missing here, and commands that need it are not on the list of unrun ones")
        super().__init__(key)


def check_options(path: Path, words: list[str]) -> None:
    """A script must know every option that is shown, also one that the short form would hide."""
    if not path.exists():
        raise SystemExit(f"there is no {path}")
    source = path.read_text(encoding="utf-8")
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        if f'"{option}"' not in source and "argparse" in source:
            raise SystemExit(f"{path} has no option {option}")


def lmms_arguments(words: list[str], notes: Path) -> list[str]:
    """Checks the words of `lmms-eval`, and returns those of a run that needs no network and takes seconds.

    Raises:
        VTPruneError: an argument in `--model_args` that the plug-in or the method does not take.
        SystemExit: no model, no task, or a file that does not exist.
    """
    from vtprune.integrations.lmms_eval import options

    given = dict(zip(words[:-1], words[1:], strict=True))
    for name in ("--model", "--model_args", "--tasks"):
        if name not in given:
            raise SystemExit(f"lmms-eval is shown without {name}: {' '.join(words)}")
    taken = ("pretrained", "method", "ratio", "keep", "mean_ratio", "square")
    values = dict(part.split("=", 1) for part in re.split(r",(?![^\[]*\])", given["--model_args"]))
    name = values.get("method", "iwp")
    read = {key: _value(value) for key, value in values.items()}
    options.method(name, {key: value for key, value in read.items() if key not in taken}, taken)
    options.budget(name, **{key: read[key] for key in ("ratio", "keep", "mean_ratio") if key in read})
    if "--include_path" in given and not (ROOT / given["--include_path"]).is_dir():
        raise SystemExit(f"there is no folder {given['--include_path']}")
    values["pretrained"] = deep_model(notes) if "layers" in values or "preset" in values else os.environ["DOCS_MODEL"]
    arguments = ",".join(f"{key}={value}" for key, value in values.items())
    short = ["--model", "vtprune", "--model_args", arguments, "--tasks", "vtprune_scenes", "--limit", "2"]
    return [
        *short,
        "--include_path",
        "benchmarks/lmms_tasks",
        "--batch_size",
        "2",
        "--output_path",
        str(notes / "lmms"),
    ]


def deep_model(notes: Path) -> str:
    """A folder with a random model of 32 thin layers, for strategies that name layers of large models."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    place = notes / "deep"
    if not place.exists():
        config = AutoConfig.from_pretrained(os.environ["DOCS_MODEL"])
        config.text_config.num_hidden_layers = 32
        config.text_config.layer_types = None
        AutoModelForImageTextToText.from_config(config).save_pretrained(place)
        AutoProcessor.from_pretrained(os.environ["DOCS_MODEL"]).save_pretrained(place)
    return str(place)


def vllm_arguments(words: list[str]) -> None:
    """Checks what belongs to vtprune in `vllm serve MODEL OPTIONS`: its part of `--additional-config`.

    Raises:
        VTPruneError: a method, a budget or a field that the plug-in does not take.
        SystemExit: not JSON.
    """
    if words[0] not in ("serve", "bench") or (words[0] == "serve" and (len(words) < 2 or words[1].startswith("-"))):
        raise SystemExit(f"vllm is shown without `serve MODEL`: {' '.join(words)}")
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--additional-config", "--additional_config"):
            from vtprune.integrations.vllm import settings

            try:
                config = json.loads(value or words[index + 1])
            except (ValueError, IndexError) as error:
                raise SystemExit(f"--additional-config is no JSON: {error}") from error
            if settings.KEY in config:
                settings.parse(config[settings.KEY])


def _value(text: str) -> object:
    """As lmms-eval reads values: numbers and truth values, else text."""
    if text in ("true", "True", "false", "False"):
        return text in ("true", "True")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
