# SPDX-License-Identifier: Apache-2.0
"""Which laws hold on which family of models: writes `benchmarks/results/families.json`.

    python -m benchmarks.families            # runs tests/laws, all families and methods
    python -m benchmarks.families -n 2       # other arguments go to pytest

A law holds on a family if at least one of its tests ran there and none failed. Tests in which a method refuses a model
are skipped, and counted as such. `python -m benchmarks.report` turns the result into the README's table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "families.json"


def collect(cases: Iterable[tuple[str, str, str]], families: Iterable[str]) -> list[dict[str, Any]]:
    """Sums test outcomes up by family.

    Args:
        cases: `(module, test, outcome)`: a module such as `tests.laws.test_1_identity`, a test such as
            `test_identity[llava-iwp]`, and `passed`, `failed` or `skipped`.
        families: Names that the first parameter of a test may have.

    Returns:
        list: For each family that was tested `model_type`, `laws` (name to whether it held) and `tests` (outcome to
        count).
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Which laws hold on which family of models.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--junit", type=Path, help="read this report of a run of the tests instead of running them")
    args, rest = parser.parse_known_args()
    import torch
    import transformers

    import vtprune

    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES

    with tempfile.TemporaryDirectory() as folder:
        report = args.junit or Path(folder) / "laws.xml"
        if args.junit is None:
            command = [sys.executable, "-m", "pytest", "-q", "tests/laws", f"--junitxml={report}", *rest]
            subprocess.run(command, cwd=ROOT, check=False)
        rows = collect(read_junit(report), FAMILIES)
    result = {
        "rows": rows,
        "versions": {
            "vtprune": vtprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{os.cpu_count()} {platform.machine()} cores, float32",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
