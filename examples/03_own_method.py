# SPDX-License-Identifier: Apache-2.0
"""Your own pruning method in ten lines."""

from __future__ import annotations

from dataclasses import dataclass

import vtprune
from vtprune import refvlm
from vtprune.refvlm import evaluate


# --- the ten lines
@vtprune.methods.register("unusual")
@dataclass
class Unusual(vtprune.methods.ScoreMethod):
    """Keeps the tokens that are farthest from the mean of their picture."""

    def score(self, tokens):
        group = tokens.group[:, None].expand_as(tokens.hidden)  # [M, D]
        means = tokens.hidden.new_zeros(len(tokens.budgets), tokens.hidden.shape[1])  # [S, D]
        means.scatter_reduce_(0, group, tokens.hidden, "mean", include_self=False)
        return (tokens.hidden - means[tokens.group]).norm(dim=-1)  # [M], higher stays


# --- end


def main() -> None:
    model, processor = refvlm.load()
    samples = list(evaluate.held_out_scenes(16))
    for method in ("unusual", "random"):
        with vtprune.patch(model, ratio=0.1, method=method) as patch:
            given = evaluate.answer(model, processor, samples)
        right = sum(sample.answer == answer for sample, answer in zip(samples, given, strict=True))
        before, after = patch.last.tokens
        print(f"{method}: {right} of {len(samples)} right with {after / before:.1%} of the visual tokens")


if __name__ == "__main__":
    main()
