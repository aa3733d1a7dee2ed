# SPDX-License-Identifier: Apache-2.0
"""Sweep of IWP's layer and duplication weight on development scenes of the built-in model, to set its defaults.

    python -m benchmarks.iwp_sweep            # writes benchmarks/results/iwp_sweep.json

Development scenes differ from those of the reported accuracies. Every row is the mean over ratios 0.1 and 0.05. Rows
are written one by one; an interrupted sweep resumes, and one of other weights or versions is overwritten only with
`--force`.
"""

from __future__ import annotations

import itertools
import json
import os
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

import vtprune
from benchmarks import command
from benchmarks.accuracy import header, wilson_of
from vtprune import refvlm
from vtprune.refvlm import evaluate, scenes
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "iwp_sweep.json"
FIRST_SEED = scenes.TRAIN_SEEDS + 9_000_000  # beyond the seeds used in training
RATIOS = (0.1, 0.05)


@lru_cache(maxsize=1)
def prepared(questions: int) -> tuple[Any, Any, list[evaluate.Sample]]:
    """Model, processor and one question per development scene."""
    torch.set_num_threads(1)
    samples = []
    for i in range(questions):
        drawn = scenes.scene(FIRST_SEED + i)
        question = drawn.questions[i % len(drawn.questions)]
        samples.append(evaluate.Sample(drawn.image, question.text, question.answer, question.kind, question.patches))
    return *refvlm.load(), samples


def right(options: dict[str, Any] | None, ratio: float, questions: int) -> int:
    """Number of right answers with IWP and `options`, or of the unpruned model."""
    model, processor, samples = prepared(questions)
    patch = vtprune.patch(model, ratio=ratio, method=vtprune.methods.IWP(**options)) if options is not None else None
    with patch or nullcontext():
        answers = evaluate.answer(model, processor, samples)
    return sum(sample.answer == given for sample, given in zip(samples, answers, strict=True))


def row(options: dict[str, Any] | None, questions: int) -> dict[str, Any]:
    """One setting over both ratios; None for the unpruned model."""
    if options is None:
        return {"right": right(None, 1.0, questions)}
    hits = [right(options, ratio, questions) for ratio in RATIOS]
    return options | {"right": hits, "total": questions} | wilson_of(sum(hits), len(RATIOS) * questions)


def main() -> None:
    parser = command.parser("Sweeps IWP's layer and duplication weight on development scenes.", OUT)
    parser.add_argument("--questions", type=int, default=384)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--duplication", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    settings = [{"layer": k, "duplication": d} for k, d in itertools.product(args.layers, args.duplication)]
    with progress.script(args.out):
        sweep(settings, args.questions, args.processes, args.out, args.force)
    print(f"written to {args.out}")


def sweep(settings: list[dict[str, Any]], questions: int, processes: int, out: Path, force: bool) -> dict[str, Any]:
    """Measures the settings that are missing in `out`, and the unpruned model.

    Raises:
        StaleResultError: `out` holds a sweep of other weights or versions, or of other questions.
    """
    data = header(questions) | {"questions": f"{questions} questions about development scenes", "ratios": list(RATIOS)}
    old = progress.load(out, data, force)
    data |= {"unpruned": old.get("unpruned"), "rows": old.get("rows", [])}
    wanted: list[dict[str, Any] | None] = [None, *settings]
    done = [{name: found[name] for name in ("layer", "duplication")} for found in data["rows"]]
    todo = [s for s in wanted if (data["unpruned"] is None if s is None else s not in done)]
    one = partial(row, questions=questions)
    for setting, found in progress.work(todo, one, "settings", done=len(wanted) - len(todo), processes=processes):
        if setting is None:
            data["unpruned"] = found["right"]
        else:
            data["rows"] = sorted([*data["rows"], found], key=lambda r: (r["layer"], r["duplication"]))
        progress.save(out, data)
        print(json.dumps(found), flush=True)
    return data


if __name__ == "__main__":
    main()
