# SPDX-License-Identifier: Apache-2.0
"""Every long command shows a bar, saves results on interrupt, resumes, and refuses result files of other versions.

The commands run on small data; slow steps are replaced.
"""

from __future__ import annotations

import importlib
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
from benchmarks import kernel_cases  # noqa: E402
from scripts import check_laws_can_fail  # noqa: E402
from tools.refvlm import data as training_data  # noqa: E402
from vtprune.bench import measure  # noqa: E402

STEPS = 3  # of every command below


@dataclass(frozen=True)
class Command:
    """A command with tiny settings.

    Attributes:
        module: Run with `python -m`.
        arguments: Its arguments; `{}` becomes an empty folder.
        step: Function that does one step.
        done: Returns the number of steps with results in the file.
        file: Name of the result file in that folder.
        instead: Replacements of slow objects, by name.
        version: Keys of the vtprune version in the file.
        anew: Whether a finished command starts over when it is run again.
    """

    module: str
    arguments: str
    step: str
    done: Callable[[dict[str, Any]], int]
    file: str = "a.json"
    instead: dict[str, Any] = field(default_factory=dict)
    version: tuple[str, ...] = ("versions", "vtprune")
    anew: bool = False


def rows(data: dict[str, Any]) -> int:
    return len(data["rows"])


def rows_and_unpruned(data: dict[str, Any]) -> int:
    return len(data["rows"]) + (data["unpruned"] is not None)


def answers(data: dict[str, Any]) -> int:
    return len(data["answers"]["scenes"] if "answers" in data else range(data["scenes"]["all"]["total"])) // 2


def entry(name: str, limit: int, only_tower: bool = False) -> dict[str, Any]:
    return {"architecture": name, "class": "", "status": "refused", "reason": "x"}


def feature(row: Any) -> dict[str, Any]:
    return {"feature": row.name, "outcome": "works", "reason": "", "tried": row.how}


def lmms_row(job: Any, **_: int) -> dict[str, Any]:
    return {"method": job.method, "processes": job.processes, "tasks": {}}


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


LIMITS = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
PASSED = [("tests.laws.test_1_identity", "test_identity[llava-iwp]", "passed")]
COMMANDS = (
    Command(
        "vtprune.refvlm.evaluate", "--scenes 6 --batch 2 --out {}/a.json", "vtprune.refvlm.evaluate.answer", answers
    ),
    Command(
        "tools.refvlm.train",
        "--out {} --look 1 --answer 2 --batch 2 --pool 3 --validate 1 --fresh 1 --every 1 --workers 1",
        "tools.refvlm.train.rate",
        lambda data: data["step"],
        "run.json",
        {"tools.refvlm.data.Pool": partial(training_data.Pool, with_easy=False)},
    ),
    Command(
        "benchmarks.kernels",
        "--device cpu --seconds 0 --rows 70 --keep 9 --scale 16 --out {}",
        "benchmarks.kernels.measure",
        rows,
        "kernels-cpu.json",
        {
            "benchmarks.kernels.cases": lambda *given, **sizes: itertools.islice(
                kernel_cases.cases(*given, **sizes), 3
            ),
            "benchmarks.kernels.ceilings": lambda *given: LIMITS,
        },
    ),
    Command(
        "benchmarks.zoo_sensitivity",
        "--runs 1 --out {}/a.json",
        "benchmarks.zoo_sensitivity.measure",
        rows,
        instead={"benchmarks.zoo_sensitivity.SHAPES": {name: (9, 8, 12, 8) for name in "abc"}},
    ),
    Command(
        "benchmarks.families",
        "--out {}/a.json",
        "benchmarks.families.tested",
        lambda data: data["rows"][0]["tests"]["passed"],
        instead={
            "benchmarks.families.LAWS": ("test_1_a", "test_10_b", "test_2_c"),
            "benchmarks.families.tested": lambda law, arguments: PASSED,
        },
        anew=True,
    ),
    Command(
        "benchmarks.accuracy",
        "--questions 2 --methods random uniform --ratios 0.5 --mean-ratios --processes 1 --out {}/a.json",
        "benchmarks.accuracy.run",
        rows_and_unpruned,
    ),
    Command(
        "benchmarks.kinds",
        "--questions 2 --methods random uniform --ratios 0.5 --out {}/a.json",
        "benchmarks.kinds.run",
        rows,
    ),
    Command(
        "benchmarks.iwp_sweep",
        "--questions 2 --layers 1 2 --duplication 0.5 --processes 1 --out {}/a.json",
        "benchmarks.iwp_sweep.row",
        rows_and_unpruned,
    ),
    Command(
        "benchmarks.lmms",
        "--methods random --out {}/a.json",
        "benchmarks.lmms.run",
        rows,
        instead={
            "benchmarks.lmms.version": lambda name: "0",
            "benchmarks.lmms.TWICE": ("random",),
            "benchmarks.lmms.run": lmms_row,
        },
    ),
    Command(
        "benchmarks.latency",
        "--model tiny --device cpu --methods random --rounds 3 --visual-tokens 144 --new-tokens 2 --json {}/a.json",
        "vtprune.bench.measure.Bench.round",
        lambda data: len(next(iter(data["settings"].values()))["rounds"]),
        instead={
            "vtprune.bench.measure.run": partial(measure.run, warm_up=0),
            "vtprune.study.stopwatch.gc": SimpleNamespace(collect=lambda: 0),  # slow where much is imported
        },
    ),
    Command(
        "vtprune",
        "fidelity --limit 3 --methods random --ratios 0.5 --max-new-tokens 2 --repeats 1 --json {}/a.json",
        "vtprune.study.fidelity.measure_prompt",
        lambda data: len(data.get("records", "all")),
    ),
    Command(
        "tests.soak",
        "--only prompts memory threads --out {}/a.json",
        "tests.soak.__main__.run",
        lambda data: len(data["parts"]),
        instead={"tests.soak.parts.PARTS": dict.fromkeys(("prompts", "memory", "threads"), lambda args: {"cases": 1})},
        anew=True,
    ),
    Command(
        "tests.architectures",
        "llava fuyu mllama --out {}",
        "tests.architectures.run.isolated",
        lambda data: len(data["architectures"]),
        "models.json",
        {"tests.architectures.run.isolated": entry},
        ("vtprune",),
        anew=True,
    ),
    Command(
        "scripts.check_laws_can_fail",
        "--out {}/a.json",
        "scripts.check_laws_can_fail.survives",
        lambda data: len(data["caught"]),
        instead={
            "scripts.check_laws_can_fail.FAULTS": check_laws_can_fail.FAULTS[:3],
            "scripts.check_laws_can_fail.survives": lambda fault, tree: False,
            "scripts.check_laws_can_fail.shutil": SimpleNamespace(copytree=nothing, ignore_patterns=nothing),
        },
        anew=True,
    ),
    Command(
        "tests.supported",
        "streamers deepcopy export --out {}",
        "tests.supported.table.run",
        rows,
        "support.json",
        {"tests.supported.table.run": feature},
        ("vtprune",),
        anew=True,
    ),
)


def found(command: Command, folder: Path) -> int:
    """Number of finished steps."""
    data = json.loads((folder / command.file).read_text(encoding="utf-8"))
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        with safe_open(checkpoint, framework="pt") as file:
            data["step"] = int(file.metadata()["step"])
    return command.done(data)


def main_of(module: str) -> Callable[[], Any]:
    package = importlib.import_module(module)
    if hasattr(package, "__path__"):
        package = importlib.import_module("vtprune.cli.main" if module == "vtprune" else f"{module}.__main__")
    return package.main


class Runs:
    """Runs a command in this process and counts its steps."""

    def __init__(self, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.steps, self.stop = main_of(command.module), 0, 0
        self.argv = [command.module, *command.arguments.replace("{}", str(folder)).split()]
        self.monkeypatch = monkeypatch
        for name, value in command.instead.items():
            monkeypatch.setattr(name, value)
        place, name = command.step.rsplit(".", 1)
        owner = main_of(command.module).__globals__ if place.endswith("__main__") else None
        real = owner[name] if owner else _resolve(place, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            if self.steps == self.stop:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(command.step, step)

    def __call__(self, *more: str, stop: int = 0) -> tuple[int, int]:
        """Runs until step `stop` interrupts; returns exit code and number of steps."""
        self.steps, self.stop = 0, stop
        self.monkeypatch.setattr(sys, "argv", [*self.argv, *more])
        try:
            code = self.main()
        except SystemExit as end:
            code = end.code
        return int(code or 0), self.steps


def _resolve(place: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(place), name)
    except ModuleNotFoundError:  # a class
        module, owner = place.rsplit(".", 1)
        return getattr(getattr(importlib.import_module(module), owner), name)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.module)
def test_long_work(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # restored after commands that set it
    run, file = Runs(command, tmp_path, monkeypatch), tmp_path / command.file

    assert run(stop=2) == (130, 2)
    message = capfd.readouterr().err
    assert "━" in message and f"1/{STEPS}" in message, message
    assert "interrupted: finished results are in" in message and "run the same command" in message
    assert found(command, tmp_path) == 1

    assert run() == (0, STEPS - 1)  # finished steps are not repeated
    assert f"{STEPS}/{STEPS}" in capfd.readouterr().err
    assert found(command, tmp_path) == STEPS
    assert run() == (0, STEPS if command.anew else 0) and found(command, tmp_path) == STEPS

    data = json.loads(file.read_text(encoding="utf-8"))
    inner = data
    for name in command.version[:-1]:
        inner = inner[name]
    inner[command.version[-1]] = "0.0.1"
    other = json.dumps(data)
    file.write_text(other, encoding="utf-8")
    capfd.readouterr()
    assert run() == (2, 0)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert '"0.0.1" there' in line and "--force" in line and "Traceback" not in line
    assert file.read_text(encoding="utf-8") == other

    assert run("--force") == (0, STEPS) and found(command, tmp_path) == STEPS
    assert "0.0.1" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "arguments", "file", "done"),
    [
        (
            "vtprune.refvlm.evaluate",
            "--scenes 300 --batch 1 --out {}/a.json",
            "a.json",
            lambda d: len(d["answers"]["scenes"]),
        ),
        (
            "benchmarks.kernels",
            "--device cpu --threads 1 --rows 70 --keep 9 --scale 16 --out {}",
            "kernels-cpu.json",
            rows,
        ),
    ],
)
def test_a_signal_loses_nothing(
    module: str, arguments: str, file: str, done: Callable[[dict[str, Any]], int], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", module, *arguments.replace("{}", str(tmp_path)).split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / file).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 130, message
    assert "interrupted: finished results are in" in message and "Traceback" not in message, message
    kept = done(json.loads((tmp_path / file).read_text(encoding="utf-8")))
    assert kept >= 1 and f"{kept}/" in message, message
    assert [path.name for path in tmp_path.iterdir()] == [file]  # no temporary file is left
