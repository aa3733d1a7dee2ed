# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.soak --out FILE`: what holds for a while holds for long. Writes what it did, and what failed.

Runs part by part and goes on after a part that fails; the exit status is 1 then. The file is written after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from . import parts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="The long tests.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("VTPRUNE_SOAK_OUT", "out/soak.json")))
    parser.add_argument("--seed", type=int, default=0, help="of the cases that are drawn")
    parser.add_argument("--cases", type=int, default=2000, help="prompts")
    parser.add_argument("--generations", type=int, default=1000, help="while memory is watched")
    parser.add_argument("--only", nargs="+", choices=list(parts.PARTS), default=list(parts.PARTS))
    args = parser.parse_args()
    import torch
    import transformers

    import vtprune

    torch.set_num_threads(1)
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() and len(args.only) == 1 else {}
    result: dict[str, Any] = {
        "parts": known.get("parts", {}),
        "seed": args.seed,
        "versions": {
            "vtprune": vtprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{os.cpu_count()} {platform.machine()} cores, one used",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        started, spent = time.perf_counter(), time.process_time()
        row: dict[str, Any] = {"passed": True}
        try:
            with torch.no_grad():
                row |= parts.PARTS[name](args)
        except BaseException as error:
            traceback.print_exc()
            row |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
            if isinstance(error, KeyboardInterrupt):
                raise
        row["seconds"] = round(time.perf_counter() - started, 1)
        row["cpu_seconds"] = round(time.process_time() - spent, 1)
        result["parts"][name] = row
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(row)}", flush=True)
    return 0 if all(row["passed"] for row in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
