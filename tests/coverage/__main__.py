# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.coverage [architecture ...]`: checks every registered architecture and writes what came of it.

Each architecture runs in a process of its own with limits on time and memory, so that one crash does not stop the rest.
Named architectures are run again and replace their entries in `docs/models.json`. Every entry is written at once: an
interrupted run goes on with the next one, a finished one is run again. Results of another version are overwritten with
`--force` only.
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
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("architectures", nargs="*", help="model types (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=300, help="seconds for each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for models.json and models.md")
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    parser.add_argument(
        "--towers", action="store_true", help="only cuts inside vision towers; what is known otherwise stays as it is"
    )
    args = parser.parse_args()

    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(1)  # children are forked: no thread may be running
    from tests.coverage import report
    from tests.coverage.run import isolated, registered
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
