# SPDX-License-Identifier: Apache-2.0
"""Records the versions and the outcome of a run of the test suite in `docs/versions.json`.

    python -m pytest tests --junitxml=suite.xml
    python -m benchmarks.versions suite.xml      # with the same Python, whose versions are recorded

Further files are reruns of parts of the suite: the last outcome of a failed test counts. A run replaces an earlier one
of the same torch and transformers. `python -m tests.supported` shows the result in docs/support.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from vtprune.study import progress

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "versions.json"


def summary(first: Path, *later: Path) -> dict[str, Any]:
    """Summarizes a run.

    Args:
        first: JUnit file of the whole suite.
        later: JUnit files of reruns.

    Returns:
        dict: `passed`, `skipped`, `expected_failures` and `failed` counts; `run_again`: number of failed tests that
        were rerun; `old_versions`: skipped tests by reason that names the version of transformers.
    """
    cases, again = _cases(first), {name: case for path in later for name, case in _cases(path).items()}
    run_again = sum(_outcome(case) == "failed" and name in again for name, case in cases.items())
    counts: Counter[str] = Counter(passed=0, skipped=0, expected_failures=0, failed=0)
    reasons: Counter[str] = Counter()
    for name, case in cases.items():
        case = again.get(name, case) if _outcome(case) == "failed" else case
        counts[_outcome(case)] += 1
        left_out = case.find("skipped")
        reason = "" if left_out is None else (left_out.get("message") or "").removeprefix("reason: ")
        if re.match(r"transformers \d", reason):
            reasons[reason.split(": ")[0]] += 1
    return {**counts, "run_again": run_again, "old_versions": dict(sorted(reasons.items()))}


def _cases(junit: Path) -> dict[tuple[str, str], ElementTree.Element]:
    """The tests of a file; a test with two entries (failure and teardown error) counts as failed."""
    cases: dict[tuple[str, str], ElementTree.Element] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = case.get("classname", ""), case.get("name", "")
        if name not in cases or _outcome(cases[name]) != "failed":
            cases[name] = case
    return cases


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    left_out = case.find("skipped")
    if left_out is None:
        return "passed"
    return "expected_failures" if left_out.get("type") == "pytest.xfail" else "skipped"


def recorded(found: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Recorded runs including `run`, sorted by version, oldest first."""
    key = run["versions"]["transformers"], run["versions"]["torch"]
    others = [r for r in found.get("runs", []) if (r["versions"]["transformers"], r["versions"]["torch"]) != key]
    return {"runs": sorted([*others, run], key=_age)}


def _age(run: dict[str, Any]) -> list[list[int]]:
    return [[int(n) for n in re.findall(r"\d+", run["versions"][name])] for name in ("transformers", "torch")]


def main() -> int:
    parser = argparse.ArgumentParser(description="Which versions the test suite was run with.")
    parser.add_argument("junit", type=Path, nargs="+", help="files written by pytest --junitxml")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    run = {"versions": progress.versions(), "python": platform.python_version()} | summary(*args.junit)
    progress.save(args.out, recorded(found, run))
    print(f"{run['passed']} passed, {run['failed']} failed; written to {args.out}")
    return 1 if run["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
