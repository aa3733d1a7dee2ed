# SPDX-License-Identifier: Apache-2.0
"""Fills the tables of README.md, with the renderer of `python -m benchmarks.report`.

python scripts/render_readme.py            # rewrites README.md
python scripts/render_readme.py --check    # exit code 1 if it would change
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.report_readme import render  # noqa: E402

README = ROOT / "README.md"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fills the tables of README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the README is out of date")
    args = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        print("README.md is up to date" if new == old else "README.md is out of date: run scripts/render_readme.py")
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
