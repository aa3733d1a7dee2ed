# SPDX-License-Identifier: Apache-2.0
"""Runs the property tests for long and writes counts and failures: `python -m tests.soak --out FILE`.

A failed part does not stop the others; the exit status is then 1. The file is written after every part: an interrupted
run resumes with the next one, a finished one starts again. Results of another version, or of other numbers of cases,
are overwritten only with `--force`.
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

from tests.soak import parts
from vtprune.study import progress


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs one part; returns whether it passed, its counts, and its duration in seconds."""
    import torch

    started, spent = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"passed": True}
    try:
        with torch.no_grad():
            row |= parts.PARTS[name](args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        traceback.print_exc()
        row |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["cpu_seconds"] = round(time.process_time() - spent, 1)
    return row


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all parts, or the rest of an interrupted run; writes the file after each.

    Raises:
        StaleResultError: The file holds results of another version, machine, or number of cases.
    """
    data: dict[str, Any] = {
        "seed": args.seed,
        "cases": args.cases,
        "generations": args.generations,
        "versions": progress.versions(),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, one used",
    }
    data |= {"parts": {}} | progress.load(args.out, data, args.force)
    work = progress.each(data, args.only, lambda name: run(name, args), "parts", lambda: progress.save(args.out, data))
    for name, row in work:
        data["parts"][name] = row
        print(f"{name}: {json.dumps(row)}", flush=True)
    return data


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="The long tests.")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("VTPRUNE_SOAK_OUT", "out/soak.json")))
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases")
    parser.add_argument("--cases", type=int, default=2000, help="prompts")
    parser.add_argument("--generations", type=int, default=1000, help="number of generations of the memory part")
    parser.add_argument("--only", nargs="+", choices=list(parts.PARTS), default=list(parts.PARTS))
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with progress.script(args.out):
        data = soak(args)
    return 0 if all(row["passed"] for row in data["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
