# SPDX-License-Identifier: Apache-2.0
"""Accuracy by kind of question: writes `benchmarks/results/kinds.json`.

    python -m benchmarks.kinds                                  # 490 questions, about 70 of each kind
    python -m benchmarks.kinds --questions 70 --methods random --out /tmp/kinds.json

Counting needs every object, reading a digit needs fine detail, a color needs one patch, so one accuracy over all
questions hides the cost of pruning. Questions are about held-out scenes, answers are scored by exact match. Runs are
written one by one, an interrupted benchmark resumes, and results of other weights or versions are overwritten only with
`--force`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import vtprune
from benchmarks.accuracy import header
from vtprune import refvlm
from vtprune.refvlm import evaluate
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "kinds.json"
METHODS = ("iwp", "divprune", "random")
RATIOS = (0.5, 0.25, 0.1)


def run(model: Any, processor: Any, samples: list[evaluate.Sample], method: str | None, ratio: float) -> dict[str, Any]:
    """One row: right answers by kind of question with a method at a ratio, or unpruned (None)."""
    if method is None:
        return {"kinds": evaluate.tally(samples, evaluate.answer(model, processor, samples))}
    with vtprune.patch(model, ratio=ratio, method=method):
        answers = evaluate.answer(model, processor, samples)
    return {"method": method, "ratio": ratio, "kinds": evaluate.tally(samples, answers)}


def measure(methods: list[str], ratios: list[float], questions: int, out: Path, force: bool = False) -> dict[str, Any]:
    """Runs everything that is missing in `out` and returns its new content."""
    data: dict[str, Any] = header(questions)
    data["rows"] = progress.load(out, data, force).get("rows", [])
    done = {(row.get("method"), row.get("ratio")) for row in data["rows"]}
    jobs: list[tuple[str | None, float | None]] = [(None, None), *((m, r) for m in methods for r in ratios)]
    todo = [job for job in jobs if job not in done]
    model, processor = refvlm.load()
    samples = list(evaluate.held_out_scenes(questions))

    def one(job: tuple[str | None, float | None]) -> dict[str, Any]:
        return run(model, processor, samples, job[0], job[1] or 1.0)

    for _, row in progress.work(todo, one, "methods", done=len(jobs) - len(todo)):
        data["rows"].append(row)
        progress.save(out, data)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the built-in model by kind of question.")
    parser.add_argument("--questions", type=int, default=490)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true", help="overwrite existing results")
    args = parser.parse_args()
    with progress.script(args.out):
        measure(args.methods, args.ratios, args.questions, args.out, args.force)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
