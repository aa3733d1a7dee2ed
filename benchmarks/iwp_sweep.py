# SPDX-License-Identifier: Apache-2.0
"""Where IWP's defaults come from: layer and duplication weight swept on development scenes of the embedded model.

    python -m benchmarks.iwp_sweep            # writes benchmarks/results/iwp_sweep.json

Development scenes are not those that accuracy is reported on. Every row is the mean over ratios 0.1 and 0.05.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import vtprune
from benchmarks.accuracy import header, wilson_of
from vtprune import refvlm
from vtprune.refvlm import evaluate, scenes

OUT = Path(__file__).resolve().parent / "results" / "iwp_sweep.json"
FIRST_SEED = scenes.TRAIN_SEEDS + 9_000_000  # the training range goes on without end; this part was not drawn
RATIOS = (0.1, 0.05)


@lru_cache(maxsize=1)
def prepared(questions: int, batch: int = 32) -> tuple[Any, Any, list[tuple[list[Any], Any]]]:
    """Model, processor and processed batches of one question per development scene."""
    torch.set_num_threads(1)
    model, processor = refvlm.load()
    samples = []
    for i in range(questions):
        drawn = scenes.scene(FIRST_SEED + i)
        question = drawn.questions[i % len(drawn.questions)]
        samples.append(evaluate.Sample(drawn.image, question.text, question.answer, question.kind, question.patches))
    batches = []
    for start in range(0, questions, batch):
        part = samples[start : start + batch]
        text = [refvlm.prompt(sample.question) for sample in part]
        inputs = processor(images=[sample.image for sample in part], text=text, return_tensors="pt", padding=True)
        batches.append((part, inputs))
    return model, processor, batches


@torch.no_grad()
def right(options: dict[str, Any] | None, ratio: float, questions: int) -> int:
    """Right answers with IWP and `options`, or of the unpruned model."""
    model, processor, batches = prepared(questions)
    patch = vtprune.patch(model, ratio=ratio, method=vtprune.methods.IWP(**options)) if options is not None else None
    count = 0
    for samples, inputs in batches:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(tokens, skip_special_tokens=True)
        count += sum(sample.answer == given.strip() for sample, given in zip(samples, answers, strict=True))
    if patch is not None:
        patch.remove()
    return count


def row(options: dict[str, Any], questions: int) -> dict[str, Any]:
    """One setting over both ratios."""
    hits = [right(options, ratio, questions) for ratio in RATIOS]
    return options | {"right": hits, "total": questions} | wilson_of(sum(hits), len(RATIOS) * questions)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sweeps IWP's layer and duplication weight on development scenes.")
    parser.add_argument("--questions", type=int, default=384)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--duplication", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    settings = [{"layer": k, "duplication": d} for k, d in itertools.product(args.layers, args.duplication)]
    rows = []
    with ProcessPoolExecutor(args.processes) as pool:
        unpruned = pool.submit(right, None, 1.0, args.questions)
        for done in pool.map(row, settings, itertools.repeat(args.questions)):
            rows.append(done)
            print(json.dumps(done), flush=True)
        data = header(args.questions) | {"questions": f"{args.questions} questions about development scenes"}
        data |= {"ratios": list(RATIOS), "unpruned": unpruned.result(), "rows": rows}
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
