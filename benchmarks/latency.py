# SPDX-License-Identifier: Apache-2.0
"""Speed and memory with and without pruning, relative to the possible gain, as in `vtprune bench`.

    python -m benchmarks.latency                    # the CPU run of the committed result
    python -m benchmarks.latency --device cuda --out DIR    # the GPU run of benchmarks.gpu_all
    python -m benchmarks.latency --model qwen2.5-vl-7b --methods iwp divprune --json FILE     # any run of vtprune bench

Without `--model`, the predefined run of the device is measured and its targets are checked (on a CPU in CPU time); the
exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import peers
from vtprune.cli import bench
from vtprune.study import progress

ROOT = Path(__file__).resolve().parent.parent
# Predefined runs by device.
CPU: dict[str, Any] = {
    "model": "small",
    "device": "cpu",
    "ratios": [0.1],
    "batch": [1],
    "visual_tokens": [2880],
    "rounds": 3,
    "new_tokens": 2,
    "methods": ["iwp:layer=0", "iwp", *peers.BOTH],
    # One thread: CPU time then equals wall time on an idle machine, and stays valid on a busy one.
    "threads": 1,
    "clock": "cpu",
}
# 160 of about 2,880 tokens, the published 5.6 %. Two new tokens (answer and end), as in yes/no benchmarks.
CUDA: dict[str, Any] = {
    "model": "llava-next-7b",
    "device": "cuda",
    "dtype": "bfloat16",
    "keep": [160],
    "batch": [1, 8],
    "visual_tokens": [2880],
    "rounds": 7,
    "new_tokens": 2,
    "methods": ["iwp:layer=0", "iwp", "zoo_prune", "divprune"],
}


def targets(data: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Targets and measurements.

    Args:
        data: Result with `rows`, and on a CPU `rows_in_cpu_time`.
        device: "cpu" or "cuda".

    Returns:
        list[dict]: `what` (text), `aim` and `measured` (numbers) and `met` (bool).
    """
    found: list[dict[str, Any]] = []

    def note(what: str, measured: float, aim: float, at_least: bool) -> None:
        met = measured >= aim if at_least else measured <= aim
        found.append({"what": what, "aim": aim, "measured": measured, "met": bool(met)})

    for row in data.get("rows_in_cpu_time", data["rows"]):
        if "refused" in row or row["variant"] == "unpruned" or row["variant"].startswith("limit "):
            continue
        name = f"{row['variant']}, batch {row['batch']}"
        if device == "cpu" and row["variant"].startswith("random "):
            note(f"{name}: prefill over the limit", row["over_limit"], 0.05, False)
        if device == "cpu" and row["variant"].startswith("iwp:layer=0 "):
            note(f"{name}: prefill over the limit", row["over_limit"], 0.20, False)
        if device == "cpu" and row["variant"].startswith(("random ", "iwp:layer=0 ")):
            note(f"{name}: prefill against unpruned", row["speedup"], 5.0, True)
        if device == "cuda" and row["variant"].startswith(("zoo_prune ", "iwp:layer=0 ")):
            note(f"{name}: prefill against unpruned", row["speedup"], 2.6, True)
            note(f"{name}: end to end against unpruned", row["speedup_end_to_end"], 2.3, True)
            note(f"{name}: selection as a share of the unpruned prefill", row["decision_share"], 0.02, False)
    wrong = [row["variant"] for row in data["rows"] if row.get("kv_bytes") != row.get("kv_bytes_formula")]
    note("variants whose KV bytes differ from the formula", len(wrong), 0, False)
    return found


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    peers.register_all()
    parser = argparse.ArgumentParser(description="Speed and memory with and without pruning.")
    bench.arguments(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    if any(text.split("=")[0] == "--model" for text in given):
        args = parser.parse_args(given)
        with progress.script(args.json):
            bench.run(args)
        return 0
    device = "cuda" if parser.parse_args(given).device == "cuda" else "cpu"
    parser.set_defaults(**(CUDA if device == "cuda" else CPU))
    args = parser.parse_args(given)
    args.out.mkdir(parents=True, exist_ok=True)
    args.json = args.json or str(args.out / f"latency-{'cpu' if device == 'cpu' else 'gpu'}.json")
    with progress.script(args.json):
        data = bench.run(args)
    missed = 0
    for target in targets(data, device):
        missed += not target["met"]
        print(
            f"{'met   ' if target['met'] else 'MISSED'} {target['what']}: {target['measured']:.3f}, {target['aim']:g}"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
