# SPDX-License-Identifier: Apache-2.0
"""Prints the first failure in the log of a run as Markdown.

    python scripts/first_failure.py LOG

Recognizes failures and errors of pytest, tracebacks, and errors of pip and make; otherwise prints the end of the log.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINES = 30
# The excerpt starts at the first match; pytest's summary is prepended.
STARTS = (
    r"^=+ (FAILURES|ERRORS) =+$",
    r"^E   ",
    r"^Traceback \(most recent call last\)",
    r"^ERROR: ",
    r"error: ",
    r"^make.*\*\*\* ",
)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def excerpt(text: str) -> str:
    """The first failure in a log."""
    lines = [_COLOR.sub("", line.rstrip()) for line in text.splitlines()]
    summary = [line for line in lines if re.match(r"(FAILED|ERROR) \S+", line)][:10]
    for pattern in STARTS:
        start = next((n for n, line in enumerate(lines) if re.search(pattern, line)), None)
        if start is not None:
            break
    else:
        start = max(0, len(lines) - LINES)
    return "\n".join([*summary, *([""] if summary else []), *lines[start : start + LINES]]).strip()


def versions(text: str) -> str:
    """The line of versions that a run prints, or an empty string."""
    return next((line for line in text.splitlines() if line.startswith("versions: ")), "")


def main() -> int:
    text = Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace")
    # The fence must be longer than any in the text.
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    print(f"{versions(text)}\n\n{fence}text\n{excerpt(text) or 'the log is empty'}\n{fence}".strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
