# SPDX-License-Identifier: Apache-2.0
"""The rows of the support table: registered by decorator, run one by one, rendered as JSON and Markdown.

A row is a function whose docstring describes the trial. It returns None if the feature works, and the message of the
library (or torch) if it is refused (see `refused`).
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtprune
from vtprune.study import progress


@dataclass(frozen=True)
class Row:
    """One feature.

    Attributes:
        name: Name in the table.
        how: The trial, in one sentence.
        check: Takes an empty folder; returns None or the message of a refusal.
        needs: Required packages.
        slow: Whether it takes more than ten seconds.
    """

    name: str
    how: str
    check: Callable[[Path], str | None]
    needs: tuple[str, ...] = ()
    slow: bool = False

    @property
    def missing(self) -> list[str]:
        """Required packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


ROWS: dict[str, Row] = {}


def row(
    name: str, *needs: str, slow: bool = False
) -> Callable[[Callable[[Path], str | None]], Callable[[Path], str | None]]:
    """Registers a row."""

    def register(check: Callable[[Path], str | None]) -> Callable[[Path], str | None]:
        ROWS[name] = Row(name, " ".join((check.__doc__ or "").split()), check, needs, slow)
        return check

    return register


def refused(call: Callable[[], Any], by: type[Exception] = vtprune.VTPruneError) -> str:
    """The message with which `call` is refused; fails if it succeeds."""
    try:
        call()
    except by as error:
        return _sentence(error)
    raise AssertionError("expected a refusal, but the call succeeded")


def _sentence(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def run(entry: Row) -> dict[str, str]:
    """Runs a row.

    Returns:
        dict: "feature", "outcome" ("works", "refused", "fails", "package missing"), "reason" and "tried".
    """
    out = {"feature": entry.name, "outcome": "works", "reason": "", "tried": entry.how}
    if entry.missing:
        return out | {"outcome": "package missing", "reason": ", ".join(entry.missing)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            reason = entry.check(Path(folder))
        except Exception as error:  # any error is a result of the table
            return out | {"outcome": "fails", "reason": f"{type(error).__name__}: {_sentence(error)[:400]}"}
    return out if reason is None else out | {"outcome": "refused", "reason": reason}


FILE = "support.json"


def load(folder: Path, force: bool = False) -> dict[str, Any]:
    """Versions and earlier rows by feature (none with `force`).

    Raises:
        StaleResultError: They are of other versions.
    """
    packages = {name: _version(name) for name in sorted({n for r in ROWS.values() for n in r.needs})}
    versions = progress.versions()
    header = versions | {"torch": versions["torch"].split("+")[0], **{n: v for n, v in packages.items() if v}}
    found = progress.load(folder / FILE, header, force)
    return found | header | {"rows": {entry["feature"]: entry for entry in found.get("rows", [])}}


def save(folder: Path, data: dict[str, Any]) -> None:
    """Writes `support.json` and `support.md`."""
    whole = data | {"rows": [data["rows"][name] for name in ROWS if name in data["rows"]]}
    progress.save(folder / FILE, whole)
    (folder / "support.md").write_text(render(whole))


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


RUNS = Path(__file__).resolve().parents[2] / "docs" / "versions.json"


def render(whole: dict[str, Any], runs: Sequence[dict[str, Any]] | None = None) -> str:
    """The table in Markdown.

    Args:
        whole: Content of `support.json`.
        runs: Runs of the test suite recorded by `benchmarks.versions`; by default those of `RUNS`.
    """
    versions = ", ".join(f"{name} {version}" for name, version in whole.items() if name not in ("left", "rows"))
    text = [
        "# Support",
        "",
        "What else is done with models, tried on patched ones. Every row is a test: `python -m tests.supported` runs "
        "them and writes this page, and `tests/test_supported.py` fails while the page says something else. What is "
        f"refused is refused with the sentence shown. ({versions}; CPU, tiny random models)",
        "",
        "| feature | outcome | tried |",
        "| --- | --- | --- |",
    ]
    for entry in whole["rows"]:
        outcome = entry["outcome"] + (f": {entry['reason']}" if entry["reason"] else "")
        cells = (entry["feature"], outcome, entry["tried"])
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if runs is None:
        runs = json.loads(RUNS.read_text())["runs"] if RUNS.exists() else []
    return "\n".join([*text, *(_versions_tested(runs) if runs else [])]) + "\n"


def _versions_tested(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines about the versions with which the whole suite was run."""
    text = [
        "",
        "## Versions",
        "",
        "The whole test suite on a CPU (`python -m benchmarks.versions` records a run). What an old transformers does "
        "wrong or lacks, unpatched too, is left out.",
        "",
        "| transformers | torch | Python | passed | failed | skipped | expected failures | notes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        versions = run["versions"]
        left_out = "; ".join(f"{_tests(count)}: {reason}" for reason, count in run["old_versions"].items())
        if run["run_again"]:
            left_out += f"{'; ' if left_out else ''}{_tests(run['run_again'])} run again after a failure"
        counts = (run[name] for name in ("passed", "failed", "skipped", "expected_failures"))
        cells = (versions["transformers"], versions["torch"], run["python"], *map(str, counts), left_out)
        text.append("| " + " | ".join(cells) + " |")
    return text


def _tests(count: int) -> str:
    return f"{count} test" if count == 1 else f"{count} tests"
