# SPDX-License-Identifier: Apache-2.0
"""Builds the folder of the Space: `examples/space`, the wheel of this version, and a requirement on it.

python scripts/build_space.py dist/vtprune-*.whl [--out build/space]
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(wheel: Path, out: Path) -> None:
    """Empties `out` and writes the Space to it."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "examples" / "space", out, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(wheel, out)
    path = out / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines.count("vtprune") != 1:
        raise SystemExit(f"{path} does not name vtprune on one line of its own")
    lines = [f"./{wheel.name}" if line == "vtprune" else line for line in lines]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "space", metavar="FOLDER")
    args = parser.parse_args()
    build(args.wheel, args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
