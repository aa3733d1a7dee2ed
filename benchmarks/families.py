# SPDX-License-Identifier: Apache-2.0
"""Which laws hold on which family of models: writes `benchmarks/results/families.json`.

    python -m benchmarks.families            # runs tests/laws, all families and methods
    python -m benchmarks.families -n 2       # other arguments are passed to pytest
    python -m benchmarks.families -k llava   # a selection of tests, recorded in the result

Results are written after every law: an interrupted run resumes, a finished one starts again. Results of another version
or selection of tests are overwritten only with `--force`. A law holds on a family if at least one of its tests ran
there and none failed. Tests in which a method refuses a model count as skipped. `python -m benchmarks.report` turns the
result into the README's table.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vtprune.study import progress

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "families.json"
LAWS = tuple(path.stem for path in (ROOT / "tests" / "laws").glob("test_*.py"))


def collect(cases: Iterable[tuple[str, str, str]], families: Iterable[str]) -> list[dict[str, Any]]:
    """Counts test outcomes by family.

    Args:
        cases: `(module, test, outcome)`: a module such as `tests.laws.test_1_identity`, a test such as
            `test_identity[llava-iwp]`, and `passed`, `failed` or `skipped`.
        families: Possible values of the first parameter of a test.

    Returns:
        list: For each tested family `model_type`, `laws` (name to whether it held) and `tests` (outcome to count).
    """
    known = sorted(families, key=len, reverse=True)  # "llava_next" before "llava"
    rows: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, str], set[str]] = {}
    for module, test, outcome in cases:
        law = re.search(r"test_(\d+)_(\w+)$", module)
        parameters = re.search(r"\[(.*)\]$", test)
        family = next((f for f in known if parameters and re.match(rf"{re.escape(f)}(-|$)", parameters[1])), None)
        if law is None or family is None:
            continue
        row = rows.setdefault(family, {"model_type": family, "laws": {}, "tests": {}})
        row["tests"][outcome] = row["tests"].get(outcome, 0) + 1
        outcomes = seen.setdefault((family, law[2]), set())
        outcomes.add(outcome)
        if outcomes != {"skipped"}:
            row["laws"][law[2].replace("_", " ")] = "failed" not in outcomes
    return [rows[family] for family in sorted(rows)]


def read_junit(path: Path) -> list[tuple[str, str, str]]:
    """`(module, test, outcome)` of every test in a JUnit file."""
    cases = []
    for case in ElementTree.parse(path).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        cases.append((case.get("classname", ""), case.get("name", ""), outcome))
    return cases


def together(parts: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merges the rows of several laws into one row per family."""
    rows: dict[str, dict[str, Any]] = {}
    for mine in itertools.chain.from_iterable(parts):
        row = rows.setdefault(mine["model_type"], {"model_type": mine["model_type"], "laws": {}, "tests": {}})
        row["laws"] |= mine["laws"]
        row["tests"] = dict(Counter(row["tests"]) + Counter(mine["tests"]))
    return [rows[family] for family in sorted(rows)]


def tested(law: str, arguments: list[str]) -> list[tuple[str, str, str]]:
    """Runs the tests of one law in a separate process; shows pytest's output if one fails.

    Raises:
        SystemExit: pytest could not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "law.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"tests/laws/{law}.py", f"--junitxml={report}", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        lines = done.stdout.strip().splitlines()
        print("\n".join(lines if done.returncode else lines[-1:]), flush=True)
        if done.returncode not in (0, 1, 5):  # passed, failed, none selected
            raise SystemExit(f"pytest ended with exit code {done.returncode} on {law}")
        return read_junit(report)


def run(
    families: Iterable[str], arguments: list[str], chosen: str | None, out: Path, force: bool = False
) -> dict[str, Any]:
    """Runs all laws, or the rest of an interrupted run.

    Raises:
        StaleResultError: `out` holds results of another version, machine or choice of tests.
    """
    data: dict[str, Any] = header(chosen)
    data |= progress.load(out, data, force)
    laws = sorted(LAWS, key=lambda law: int(law.split("_")[1]))
    parts: dict[str, list[dict[str, Any]]] = data.pop("laws", {}) if "left" in data else {}
    arguments = [*arguments, "-k", chosen] if chosen else arguments

    def write() -> None:
        if "left" in data:
            data["laws"] = parts
        else:
            data.pop("laws", None)
        progress.save(out, data)

    for law, cases in progress.each(data, laws, lambda law: tested(law, arguments), "laws", write):
        parts[law] = collect(cases, families)
        data["rows"] = together(parts.values())
    return data


def header(chosen: str | None) -> dict[str, Any]:
    """Conditions that must be equal for results to be comparable."""
    machine = f"{os.cpu_count()} {platform.machine()} cores, float32"
    return {"tests": chosen or "all", "versions": progress.versions(), "machine": machine}


def main() -> int:
    parser = argparse.ArgumentParser(description="Which laws hold on which family of models.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--junit", type=Path, help="read this JUnit report instead of running the tests")
    parser.add_argument("-k", metavar="EXPRESSION", help="pytest's selection of tests")
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args, rest = parser.parse_known_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES

    with progress.script(args.out):
        if args.junit is None:
            run(FAMILIES, rest, args.k, args.out, args.force)
        else:
            data = header(args.k)
            progress.load(args.out, data, args.force)
            progress.save(args.out, data | {"rows": collect(read_junit(args.junit), FAMILIES)})
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
