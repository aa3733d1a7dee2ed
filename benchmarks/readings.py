# SPDX-License-Identifier: Apache-2.0
"""Two interpretations of VisPruner and DART compared: writes `benchmarks/results/readings.json`.

    python -m benchmarks.readings

The library's methods are tested against the authors' code (`tests/golden_checks`). AngelSlim's rules are implemented
here from its source (Tencent/AngelSlim, `compressor/token_compressor/algorithm`, at 17d3d92); the docstrings below
name the differences. Measures right answers of both built-in models, and the share of the library's kept set.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import command, kept_sets
from vtprune import refvlm
from vtprune.core.method import Choice, Method, Tap
from vtprune.core.taps import layer_output, over_prompt
from vtprune.core.tokens import Tokens
from vtprune.methods import DART, VisPruner
from vtprune.refvlm import evaluate
from vtprune.study import progress
from vtprune.vision.crops import by_crop
from vtprune.vision.tower import Vision

OUT = Path(__file__).resolve().parent / "results" / "readings.json"
RATIOS = (0.25, 0.1)


def thin_out(features: Tensor, rows: Tensor, count: int, step: int = 8) -> Tensor:
    """AngelSlim's removal of duplicates, which keeps raster order and drops at most half of the rows per round.

    Args:
        features: `[n, F]`.
        rows: `[R]` rows, ascending.
        count: Number of remaining rows.
        step: Rows deleted per round.
    """
    unit = normalize(features.float(), dim=-1)
    while len(rows) > count:
        even, odd = rows[::2], rows[1::2]
        if len(odd) == 0:
            break
        nearest = (unit[even] @ unit[odd].T).amax(1)
        left = even[nearest.argsort(descending=True)[min(step, len(rows) // 2, len(rows) - count) :]]
        rows = torch.cat([left, odd]).sort().values
    return rows


@dataclass
class OtherVisPruner(VisPruner):
    """AngelSlim's VisPruner: projected features, diverse rows in raster order, and a rounded share."""

    def choose(self, tokens: Tokens) -> Choice:
        vision = Vision(tokens, self.name)
        scores = vision.importance()
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        for rows, budget, _ in by_crop(tokens, vision.crop).each():
            important = scores[rows].topk(min(round(budget * self.important), max(budget - 1, 1))).indices
            rest = torch.ones(len(rows), dtype=torch.bool)
            rest[important] = False
            diverse = thin_out(tokens.hidden[rows], rest.nonzero()[:, 0], budget - len(important), self.step)
            keep[rows[important]] = keep[rows[diverse]] = True
        return Choice(keep, scores=scores)


@dataclass
class OtherDART(DART):
    """AngelSlim's DART: rotated keys, text pivots of the whole prompt, states entering layer K-1 behind its own norm.

    Every pivot selects the same share, rounded up, until the budget is met, so the last pivots may select nothing.
    """

    def taps(self, anatomy: Any) -> tuple[Tap, ...]:
        layer = anatomy.layers[self.schedule(anatomy.num_layers)[0].layer - 1]
        return (Tap("dart.normed", layer.input_layernorm, layer_output),)

    def choose(self, tokens: Tokens) -> Choice:
        inputs, prompt = tokens.attention_inputs(tokens.layer - 1), tokens.prompt
        assert prompt is not None
        size = inputs.keys.float().abs().sum((-2, -1))
        unit = normalize(over_prompt(tokens.recorded["dart.normed"][-1], tokens).float(), dim=-1)  # [C, D]
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        starts, groups = prompt.offsets.tolist(), tokens.offsets.tolist()
        for group, budget in enumerate(tokens.budgets.tolist()):
            mine = torch.arange(groups[group], groups[group + 1])
            rows = prompt.visual[mine]
            text = torch.ones(starts[group + 1] - starts[group], dtype=torch.bool)
            text[rows - starts[group]] = False
            others = text.nonzero()[:, 0] + starts[group]
            pivots = [size[some].topk(min(self.pivots, len(some), budget)).indices for some in (rows, others)]
            taken = torch.zeros(len(rows), dtype=torch.bool)
            taken[pivots[0]] = True
            axes = torch.cat([rows[pivots[0]], others[pivots[1]]])
            share = -(-(budget - len(pivots[0])) // len(axes))
            for axis in axes:
                near = (unit[rows] @ unit[axis]).masked_fill(taken, torch.inf)
                taken[near.topk(min(share, budget - int(taken.sum())), largest=False).indices] = True
            keep[mine[taken]] = True
        return Choice(keep)


VARIANTS: dict[str, dict[str, Method]] = {
    "vispruner": {"ours": VisPruner(), "AngelSlim's": OtherVisPruner()},
    "dart": {"ours": DART(), "rotated keys": DART(rope=True), "AngelSlim's": OtherDART()},
}


def measure(name: str, questions: int) -> list[dict[str, Any]]:
    """A row per interpretation and ratio."""
    model, processor = refvlm.load(name=name)
    samples = list(evaluate.held_out_scenes(questions))
    rows = []
    for ratio in RATIOS:
        for published, variants in VARIANTS.items():
            ours: list[set[int]] = []
            for reading, method in variants.items():
                right, kept = kept_sets.answer(model, processor, samples, method, ratio)
                ours = ours or kept
                row = {"model": name, "method": published, "reading": reading, "ratio": ratio, "right": sum(right)}
                rows.append({**row, "total": len(samples), "same": kept_sets.overlap(ours, kept)})
    return rows


def main() -> None:
    parser = command.parser("Two readings of VisPruner and DART.", OUT, resumes=False)
    parser.add_argument("--questions", type=int, default=120)
    args = parser.parse_args()
    rows = [row for name in refvlm.MODELS for row in measure(name, args.questions)]
    progress.save(args.out, {"versions": progress.versions(), "rows": rows})
    for row in rows:
        print(
            f"{row['model']:12} {row['method']:10} {row['reading']:14} {row['ratio']:5} "
            f"{row['right'] / row['total']:.1%} {row['same']:.0%}"
        )


if __name__ == "__main__":
    main()
