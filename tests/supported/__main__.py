# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.supported [word ...]`: tries every feature and writes `docs/support.json` and `docs/support.md`.

Rows whose name contains one of the words are tried again and replace their entries.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.supported", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names of rows (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of support.json and support.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    from tests.supported import rows, table

    known = {e["feature"]: e for e in table.load(args.out)["rows"]} if args.words else {}
    for entry in rows.ROWS.values():
        if not args.words or any(word.lower() in entry.name.lower() for word in args.words):
            known[entry.name] = table.run(entry)
            print(f"{known[entry.name]['outcome']:<16} {entry.name:<48} {known[entry.name]['reason']}", flush=True)
    table.save(args.out, [known[name] for name in rows.ROWS if name in known])
    sys.exit(any(e["outcome"] == "fails" for e in known.values()))


main()
