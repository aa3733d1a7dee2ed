# SPDX-License-Identifier: Apache-2.0
"""Sign and weight of CDPruner's text relevance without CLIP: writes `benchmarks/results/cdpruner_relevance.json`.

    python -m benchmarks.cdpruner_relevance

Right answers of both built-in models on held-out scenes, with sign and weight of the relevance varied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import vtprune
from benchmarks import command
from vtprune import refvlm
from vtprune.core.tokens import Tokens
from vtprune.methods import CDPruner
from vtprune.refvlm import evaluate
from vtprune.study import progress

OUT = Path(__file__).resolve().parent / "results" / "cdpruner_relevance.json"
RATIOS = (0.25, 0.1, 0.05)


@dataclass
class Negated(CDPruner):
    """Relevance with the sign for CLIP embeddings, applied to the decoder's embeddings."""

    def cosine(self, tokens: Tokens) -> Tensor:
        return -super().cosine(tokens)


VARIANTS = {
    "negated, released weight": Negated(theta="released"),
    "cosine, released weight": CDPruner(theta="released"),
    "negated, theta 0.5": Negated(theta=0.5),
    "cosine, theta 0.5": CDPruner(),
    "no text": CDPruner(relevance="none"),
}


def measure(name: str, questions: int) -> list[dict[str, Any]]:
    """A row for every variant and ratio."""
    model, processor = refvlm.load(name=name)
    samples = list(evaluate.held_out_scenes(questions))
    rows = []
    for variant, method in VARIANTS.items():
        for ratio in RATIOS:
            with vtprune.patch(model, ratio=ratio, method=method):
                answers = evaluate.answer(model, processor, samples)
            right = sum(sample.answer == given for sample, given in zip(samples, answers, strict=True))
            rows.append({"model": name, "variant": variant, "ratio": ratio, "right": right, "total": len(samples)})
    return rows


def main() -> None:
    parser = command.parser("Sign and weight of CDPruner's relevance without CLIP.", OUT, resumes=False)
    parser.add_argument("--questions", type=int, default=120)
    args = parser.parse_args()
    rows = [row for name in refvlm.MODELS for row in measure(name, args.questions)]
    progress.save(args.out, {"versions": progress.versions(), "rows": rows})
    for row in rows:
        print(f"{row['model']:12} {row['variant']:26} {row['ratio']:5} {row['right'] / row['total']:.1%}")


if __name__ == "__main__":
    main()
