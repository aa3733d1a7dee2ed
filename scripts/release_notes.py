# SPDX-License-Identifier: Apache-2.0
"""Prints the section of CHANGELOG.md about one version; with `--check`, checks that all files agree on the version.

python scripts/release_notes.py 0.1.0
python scripts/release_notes.py --check [v0.1.0]
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    """The version in vtprune/__init__.py."""
    text = (ROOT / "vtprune" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.M)[1]  # type: ignore[index]


def notes(wanted: str) -> str:
    """The changelog entries of a version, or an empty string."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(wanted)}\b[^\n]*\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found[1].strip() if found else ""


def problems(tag: str | None) -> list[str]:
    """Problems that prevent a release of this tree (under `tag`, if given)."""
    current, found = version(), []
    if tag and tag != f"v{current}":
        found.append(f"the tag is {tag}, but vtprune/__init__.py says {current}")
    if not notes(current):
        found.append(f"CHANGELOG.md has no section of {current}")
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    if cited is None or cited[1] != current:
        found.append(f"CITATION.cff does not say version {current}")
    if re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M):
        found.append("pyproject.toml has a version of its own; it is read from vtprune/__init__.py")
    date = re.search(rf"^## {re.escape(current)} \((\d{{4}}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    if tag and (date is None or datetime.date.fromisoformat(date[1]) > datetime.date.today()):
        found.append(f"CHANGELOG.md has no date for {current}, such as `## {current} (2026-01-31)`")
    return found


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] != ["--check"]:
        text = notes(arguments[0])
        print(text)
        return 0 if text else 1
    found = problems(arguments[1] if len(arguments) > 1 and arguments[1] else None)
    print("\n".join(found) if found else f"version {version()}: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
