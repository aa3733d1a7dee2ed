# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.architectures [architecture ...]`: checks every registered architecture and writes the results.

Each architecture runs in its own process with limits on time and memory, so that a crash does not stop the others.
Named architectures are rerun and replace their entries in `docs/models.json`. Entries are written one by one: an
interrupted run resumes, a finished one starts again. Results of other versions are overwritten only with `--force`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("architectures", nargs="*", help="model types (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent processes (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=300, help="seconds per architecture (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for models.json and models.md")
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    parser.add_argument(
        "--towers", action="store_true", help="check only cuts inside vision towers and keep all other results"
    )
    args = parser.parse_args()

    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(1)  # children are forked, which is unsafe with running threads
    from tests.architectures import report
    from tests.architectures.run import isolated, registered
    from vtprune.study import progress

    known = registered()
    unknown = set(args.architectures) - set(known)
    if unknown:
        parser.error(f"not registered: {', '.join(sorted(unknown))}")
    with progress.script(args.out / report.FILE):
        data = report.load(args.out, args.force)
        examine = partial(isolated, limit=args.limit, only_tower=args.towers)
        names, write = args.architectures or list(known), partial(report.save, args.out, data, list(known))
        for name, entry in progress.each(data, names, examine, "architectures", write, processes=args.jobs):
            if args.towers:
                known_before = data["architectures"].get(name, entry)
                entry = known_before | ({"tower": entry["tower"]} if "tower" in entry else {})
            data["architectures"][name] = entry
            print(report.tower_line(entry) if args.towers else report.line(entry), flush=True)
    print(json.dumps(report.summary(data["architectures"].values())))


if __name__ == "__main__":
    main()
