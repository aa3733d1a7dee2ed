# SPDX-License-Identifier: Apache-2.0
"""Effect of sampling query rows on received attention: writes `benchmarks/results/received.json`.

    python -m benchmarks.received

The built-in Qwen2.5-VL has no class token; its pictures have 576 patches, fewer than are sampled by default, so
sampling is requested. For every number of rows: right answers on held-out scenes, and overlap of the kept set with that
of all rows. The error of a mean over rows depends on their number, not on the number of patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import command, kept_sets
from vtprune import refvlm
from vtprune.methods import get
from vtprune.refvlm import evaluate
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "received.json"
METHODS, QUERIES, RATIO = ("visionzip", "vispruner"), ("all", 512, 256, 128, 64), 0.1


def measure(method: str, questions: int) -> list[dict[str, Any]]:
    """A row per number of query rows."""
    model, processor = refvlm.load(name="qwen2_5_vl")
    samples = list(evaluate.held_out_scenes(questions))
    rows: list[dict[str, Any]] = []
    whole: list[set[int]] = []
    for queries in QUERIES:
        right, kept = kept_sets.answer(model, processor, samples, get(method)(queries=queries), RATIO)
        whole = whole or kept
        row = {"method": method, "queries": queries, "right": sum(right), "total": len(samples)}
        rows.append({**row, "same": kept_sets.overlap(whole, kept)})
    return rows


def main() -> None:
    parser = command.parser("Received attention of a sample of query rows.", OUT, resumes=False)
    parser.add_argument("--questions", type=int, default=120)
    args = parser.parse_args()
    rows = [row for method in METHODS for row in measure(method, args.questions)]
    progress.save(args.out, {"versions": progress.versions(), "ratio": RATIO, "rows": rows})
    for row in rows:
        print(f"{row['method']:10} {row['queries']!s:4} {row['right'] / row['total']:.1%} {row['same']:.1%}")


if __name__ == "__main__":
    main()
