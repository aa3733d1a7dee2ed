# SPDX-License-Identifier: Apache-2.0
"""What pruning does to each kind of question: writes `benchmarks/results/kinds.json`.

    python -m benchmarks.kinds                                  # 490 questions, about 70 of each kind
    python -m benchmarks.kinds --questions 70 --methods random --out /tmp/kinds.json

Counting needs every object, reading a digit needs fine detail, a colour needs one patch: one accuracy over all
questions hides what pruning costs. Questions are about held-out scenes, answers are right only word for word. Every
finished run is written at once; an interrupted benchmark goes on where it stopped, unless weights or versions changed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import vtprune
from benchmarks.accuracy import header
from vtprune import refvlm
from vtprune.refvlm import evaluate

OUT = Path(__file__).resolve().parent / "results" / "kinds.json"
METHODS = ("iwp", "divprune", "random")
RATIOS = (0.5, 0.25, 0.1)


def run(model: Any, processor: Any, samples: list[evaluate.Sample], method: str | None, ratio: float) -> dict[str, Any]:
    """One row: right answers by kind of question, with a method at a ratio, or (None) without pruning."""
    if method is None:
        return {"kinds": evaluate.tally(samples, evaluate.answer(model, processor, samples))}
    with vtprune.patch(model, ratio=ratio, method=method):
        answers = evaluate.answer(model, processor, samples)
    return {"method": method, "ratio": ratio, "kinds": evaluate.tally(samples, answers)}


def measure(methods: list[str], ratios: list[float], questions: int, out: Path, log: Any = lambda text: None) -> dict:
    """Runs what `out` does not hold yet, and returns what it then holds."""
    data: dict[str, Any] = header(questions)
    old = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    same = all(old.get(key) == value for key, value in data.items())
    data["rows"] = old["rows"] if same else []
    done = {(row.get("method"), row.get("ratio")) for row in data["rows"]}
    model, processor = refvlm.load()
    samples = list(evaluate.held_out_scenes(questions))
    jobs: list[tuple[str | None, float | None]] = [(None, None), *((m, r) for m in methods for r in ratios)]
    for method, ratio in jobs:
        if (method, ratio) in done:
            continue
        data["rows"].append(run(model, processor, samples, method, ratio or 1.0))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        log(f"{method or 'unpruned'} {ratio or ''}: {data['rows'][-1]['kinds']['all']['accuracy']:.1%}")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the embedded model by kind of question.")
    parser.add_argument("--questions", type=int, default=490)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    measure(args.methods, args.ratios, args.questions, args.out, log=lambda text: print(text, flush=True))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
