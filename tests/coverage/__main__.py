# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.coverage [architecture ...]`: checks every registered architecture and writes what came of it.

Each architecture runs in a process of its own with limits on time and memory, so that one crash does not stop the rest.
Named architectures are run again and replace their entries in `docs/models.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("architectures", nargs="*", help="model types (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=300, help="seconds for each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for models.json and models.md")
    args = parser.parse_args()

    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    torch.set_num_threads(1)  # children are forked: no thread may be running
    from tests.coverage import report
    from tests.coverage.run import isolated, registered

    known = registered()
    unknown = set(args.architectures) - set(known)
    if unknown:
        parser.error(f"not registered: {', '.join(sorted(unknown))}")
    names = args.architectures or list(known)
    results = report.load(args.out) if args.architectures else {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for entry in pool.map(lambda name: isolated(name, known[name], args.limit), names):
            results[entry["architecture"]] = entry
            print(report.line(entry), flush=True)
            report.save(args.out, {name: results[name] for name in known if name in results})
    print(json.dumps(report.summary(results.values())))


main()
