# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the embedded model with every pruning method: writes `benchmarks/results/accuracy.json`.

    python benchmarks/accuracy.py                       # all methods, 1,000 questions: takes a while on two cores
    python benchmarks/accuracy.py --questions 64 --methods iwp random --out /tmp/a.json

Questions are about held-out scenes, answers are generated greedily in padded batches and are right only word for word.
`scripts/render_readme.py` turns the result into the README's table.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import vtprune
from vtprune import refvlm
from vtprune.refvlm import evaluate

OUT = Path(__file__).resolve().parent / "results" / "accuracy.json"


def measure(
    methods: list[str], ratios: list[float], questions: int, batch: int = 32, log: Any = lambda text: None
) -> dict[str, Any]:
    """Answers the same questions unpruned and with every method at every ratio.

    Args:
        methods: Registered names.
        ratios: Shares of visual tokens kept.
        questions: How many, one or more per held-out scene.
        batch: Prompts per call.
        log: Called with a line of text after every run.

    Returns:
        dict: What `accuracy.json` holds.
    """
    model, processor = refvlm.load()
    samples = list(itertools.islice(evaluate.held_out_scenes(questions), questions))
    unpruned = _row(samples, evaluate.answer(model, processor, samples, batch))
    rows = []
    for name, ratio in itertools.product(methods, ratios):
        with vtprune.patch(model, ratio=ratio, method=name) as patch:
            row = _row(samples, evaluate.answer(model, processor, samples, batch))
            last = patch.last
        # All pictures have as many tokens and all budgets are exact, so the last batch stands for every one.
        kept = {len(sample) for sample in last.kept}
        assert len(kept) == 1, kept
        rows.append(
            {"method": name, "ratio": ratio, "kept": kept.pop(), "mean_tokens": last.mean_ratio * refvlm.VISUAL_TOKENS}
            | row
        )
        log(f"{name} {ratio:g}: {row['right']} of {row['total']}")
    return {
        "questions": f"{len(samples):,} questions about held-out scenes",
        "unpruned": {"visual_tokens": refvlm.VISUAL_TOKENS} | unpruned,
        "rows": rows,
        "weights_sha256": hashlib.sha256((refvlm.WEIGHTS / "model.safetensors").read_bytes()).hexdigest(),
        "versions": {
            "vtprune": vtprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{os.cpu_count()} {platform.machine()} cores, float32",
    }


def _row(samples: list[evaluate.Sample], answers: list[str]) -> dict[str, Any]:
    right = sum(sample.answer == given for sample, given in zip(samples, answers, strict=True))
    return {
        "right": right,
        "total": len(samples),
        "interval": [round(bound, 4) for bound in evaluate.wilson(right, len(samples))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the embedded model with every pruning method.")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=list(vtprune.methods.names()))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    result = measure(args.methods, args.ratios, args.questions, args.batch, log=lambda text: print(text, flush=True))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
