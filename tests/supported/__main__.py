# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.supported [word ...]`: tries every feature and writes `docs/support.json` and `docs/support.md`.

Rows whose name contains one of the words are rerun and replace their entries. Rows are written one by one: an
interrupted run resumes, a finished one starts again. Rows of other versions are overwritten only with `--force`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.supported", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of names of rows (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of support.json and support.md")
    parser.add_argument("--force", action="store_true", help="start again, and overwrite rows of other versions")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    from tests.supported import rows, table
    from vtprune.study import progress

    names = [name for name in rows.ROWS if not args.words or any(w.lower() in name.lower() for w in args.words)]
    with progress.script(args.out / table.FILE):
        data = table.load(args.out, args.force)
        run, write = (lambda name: table.run(rows.ROWS[name])), partial(table.save, args.out, data)
        for name, entry in progress.each(data, names, run, "features", write):
            data["rows"][name] = entry
            print(f"{entry['outcome']:<16} {name:<48} {entry['reason']}", flush=True)
    sys.exit(any(entry["outcome"] == "fails" for entry in data["rows"].values()))


if __name__ == "__main__":
    main()
