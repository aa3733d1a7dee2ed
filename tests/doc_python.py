# SPDX-License-Identifier: Apache-2.0
"""What `python`, `pytest` and `vtprune` do when shell blocks call them, and how long things are kept short."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import doc_servers
import pytest
from doc_checks import EVERYTHING, PLACEHOLDER, ROOT, Checked, check_options, runs_here

# Appended to the words of a command of vtprune, or of a module: later options win. {out} is a file for results.
COMMANDS = {
    "demo": "--repeats 1",
    "run": "--repeats 1 --max-new-tokens 2 --device cpu",
    "compare": "--repeats 1 --methods uniform --device cpu",
    "tune": "--trials 1 --device cpu",
    "fidelity": "--limit 1 --methods uniform --ratios 0.1 --repeats 1 --max-new-tokens 2 --device cpu",
    "bench": "--model tiny --methods uniform --visual-tokens 64 --batch 1 --new-tokens 1 --rounds 1 --device cpu",
}
MODULES = {
    "benchmarks.accuracy": "--questions 2 --methods random --ratios 0.1 --mean-ratios --processes 1 --out {out}",
    "benchmarks.kinds": "--questions 7 --methods random --ratios 0.1 --out {out}",
    "benchmarks.lmms": "--methods random --limit 2 --out {out}",
}
# Modules that are only checked where something is missing: the key of `doc_checks.ONLY_CHECKED`.
NEEDS = {"benchmarks.lmms": "lmms_eval", "benchmarks.serving": "vllm", "mkdocs": "mkdocs"}


def notes() -> Path:
    """The folder for what no reader sees."""
    return Path(os.environ["DOCS_NOTES"])


def checkout() -> Path:
    """The repository where the reader has it: the folder he stands in, or `vtprune` in that of the session."""
    here = Path.cwd()
    if (here / "pyproject.toml").exists():
        return here
    place = Path(os.environ["DOCS_SESSION"]) / "vtprune"
    if not (place / "pyproject.toml").exists():
        copy(place)
        (notes() / "copied").touch()
    return place


def copy(place: Path) -> None:
    """Lays the repository, as it is now, into a folder that may be there."""
    left = (".git", ".venv*", "build", "dist", "out", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*left), dirs_exist_ok=True)


def run_vtprune(words: list[str]) -> int:
    """The command, with what keeps it short."""
    from vtprune.cli.main import main

    return main([*filled(words), *COMMANDS.get(words[0], "").split()])


def filled(words: list[str]) -> list[str]:
    """Words in which names of models and placeholders are what the test has in their place."""
    given = list(words)
    for index, word in enumerate(given[:-1]):
        value = given[index + 1]
        if word in ("--image", "--images") and PLACEHOLDER.fullmatch(value):
            given[index + 1] = "photos"
        elif word == "--model" and not Path(value).exists() and (PLACEHOLDER.fullmatch(value) or "/" in value):
            given[index + 1] = os.environ["DOCS_MODEL"]
        elif PLACEHOLDER.fullmatch(value):
            given[index + 1] = str(notes())
    return given


def python(words: list[str]) -> int:
    """`python -m MODULE`, `python -c CODE` and `python SCRIPT`; a script that serves goes on until its page ends."""
    if words[0] == "-m":
        return _module(words[1], words[2:])
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], os.getcwd()
        exec(words[1], {"__name__": "__main__"})
        return 0
    if "serve" in words or "--serve" in words or words[0] == doc_servers.SPACE:
        return doc_servers.start(words[0], lambda rest: _script(words[0], rest), words[1:])
    return _script(words[0], words[1:])


def _script(path: str, words: list[str]) -> int:
    """A script of the repository, or one that the reader wrote where he stands."""
    if not Path(path).exists():
        os.chdir(checkout())
    check_options(Path(path), words)
    sys.argv, sys.path[0] = [path, *words], str(Path(path).resolve().parent)
    if path in _SHORT:
        return _SHORT[path](path)
    runpy.run_path(path, run_name="__main__")
    return 0


def _faults(path: str) -> int:
    """One fault is put into the engine, not all of them; the source must have what each of them replaces."""
    scope = runpy.run_path(path)
    for fault in scope["FAULTS"]:
        if fault.old not in Path("vtprune", fault.file).read_text(encoding="utf-8"):
            raise SystemExit(f"vtprune/{fault.file} no longer contains {fault.old!r}: adapt {fault.what!r} in {path}")
    scope["main"].__globals__["FAULTS"] = scope["FAULTS"][: None if EVERYTHING else 1]
    return scope["main"]()


def _launches(path: str) -> int:
    """Two operations are compiled, not all of them; in a new process, since Triton may interpret in this one."""
    short = (
        "import runpy, sys; sys.path.insert(0, 'tests'); sys.argv = sys.argv[1:];"
        "from kernel_tests import gpu_cases as cases; every = cases.launches;"
        "cases.launches = lambda dtype: list(every(dtype))[:2]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return execute([sys.executable, *(() if EVERYTHING else ("-c", short)), *sys.argv])


_SHORT: dict[str, Callable[[str], int]] = {
    "scripts/check_laws_can_fail.py": _faults,
    "tests/kernel_tests/compile_for_gpu.py": _launches,
}


def _module(module: str, words: list[str]) -> int:
    own = module.split(".")[0] in ("benchmarks", "tests", "scripts", "vtprune")
    if own or module in ("ruff", "mypy", "mkdocs"):
        os.chdir(checkout())
    if own:
        file = Path(f"{module.replace('.', '/')}.py")
        check_options(file if file.exists() else file.with_suffix("") / "__main__.py", words)
    if module in NEEDS and not runs_here(NEEDS[module]):
        raise Checked(NEEDS[module])
    if module in ("ruff", "mypy") and not EVERYTHING:
        words = [word for word in words if word != "."] + ["vtprune/errors.py"]
        words += ["--follow-imports=skip"] if module == "mypy" else []
    if module in ("ruff", "mypy"):  # which end the process without returning
        return execute([sys.executable, "-m", module, *words])
    if module == "venv":
        return _venv(words)
    if module == "pytest":
        return run_pytest(words)
    if module == "vtprune":
        return run_vtprune(words)
    if own:
        assert module in MODULES, f"say in MODULES what makes {module} short"
        words = [*words, *MODULES[module].format(out=notes() / f"{module}.json").split()]
    return run_module(module, words)


def _venv(words: list[str]) -> int:
    """An environment whose Python is the stand-in, since no package would be in a fresh one."""
    venv.create(words[-1])  # without pip, so that the stand-in is found
    for name in ("python", "python3"):
        place = Path(words[-1], "bin", name)
        place.unlink()
        place.symlink_to(Path(os.environ["DOCS_BIN"], "python"))
    return 0


def run_module(module: str, words: list[str]) -> int:
    """As `python -m MODULE WORDS` in this process."""
    sys.argv, sys.path[0] = [module, *words], os.getcwd()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


class _One:
    """For pytest: of the tests that were chosen, the first is run; and whether files were skipped as a whole."""

    skipped = False

    def pytest_collectreport(self, report) -> None:
        self.skipped |= report.skipped

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items) -> None:
        config.hook.pytest_deselected(items=items[1:])
        del items[1:]


def _number(path: Path) -> tuple[int, str]:
    """Files of tests in order: by number, where they have one."""
    return int((re.findall(r"\d+", path.name) or ["0"])[0]), path.name


def run_pytest(words: list[str]) -> int:
    """One test of those shown; of a folder, its first file is read."""
    os.chdir(checkout())
    given, skip = [], False
    for word in filled(words):
        if not skip and word in ("-n", "--dist", "--durations", "-m"):  # how, not what
            skip = True
        elif skip:
            skip = False
        elif Path(word).is_dir() and word.startswith("tests") and not EVERYTHING:
            given.append(str(min(Path(word).glob("test_*.py"), key=_number)))
        else:
            given.append(word)
    if not any(word.startswith("tests") for word in given):
        given.append("tests/test_packaging.py")
    sys.path[0] = os.getcwd()
    one = _One()
    status = pytest.main([*given, "-p", "no:cacheprovider", "-p", "no:xdist"], plugins=[one])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and one.skipped:
        raise Checked("pytest")
    return int(status)


def execute(words: list[str]) -> int:
    """A program that is no Python, or wants a process for itself: the real one, wherever it is."""
    sys.stdout.flush()
    real = shutil.which(words[0], path=os.environ["DOCS_PATH"])
    if real is None:
        raise Checked(words[0])
    return subprocess.run([real, *words[1:]], check=False).returncode
