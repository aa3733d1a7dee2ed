# SPDX-License-Identifier: Apache-2.0
"""Plain selection loops of published methods, implemented from their formulas, for comparison in `vtprune bench`.

    python -m benchmarks.peers --model llava-1.5-7b

runs `vtprune bench` with the given options and three additional methods in the same engine and run: `plain-divprune`,
`plain-cdpruner` and `plain-visionzip`. None is the authors' released code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from vtprune.cli import main as cli
from vtprune.core.method import Choice, Method
from vtprune.core.tokens import Tokens
from vtprune.errors import MethodError
from vtprune.methods import CDPruner, DivPrune, VisionZip, register
from vtprune.vision.crops import by_crop
from vtprune.vision.tower import Vision, crops_seen


def divprune(features: Tensor, count: int) -> Tensor:
    """Max-min diversity, arXiv 2503.02175, section 3, with the full distance matrix and one step per token.

    Args:
        features: `[N, D]` projected features.
        count: Tokens to pick, at most `N`.

    Returns:
        Tensor: `[count]` rows in selection order.
    """
    unit = normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.T  # [N, N]
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(0)
    picked = [nearest.argmax()]
    least = distance[picked[0]].clone()
    for _ in range(count - 1):
        least[picked[-1]] = -torch.inf
        picked.append(least.argmax())
        least = torch.minimum(least, distance[picked[-1]])
    return torch.stack(picked)


def cdpruner(features: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Greedy MAP of the conditional DPP, arXiv 2506.10967, with the full kernel matrix.

    Args:
        features: `[N, D]` projected features.
        relevance: `[N]` scaled to (0, 1].
        count: Tokens to pick, at most `N`.

    Returns:
        Tensor: `[count]` rows in selection order.
    """
    unit = normalize(features.float(), dim=-1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None, :]  # [N, N]
    gain = kernel.diagonal().clone()
    basis = kernel.new_zeros(count, len(kernel))
    picked = []
    for step in range(count):
        best = gain.argmax()
        picked.append(best)
        row = (kernel[best] - basis[:step, best] @ basis[:step]) / gain[best].clamp_min(1e-12).sqrt()
        basis[step] = row
        gain = gain - row**2
        gain[best] = -torch.inf
    return torch.stack(picked)


def visionzip(attention: Tensor, keys: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dominant and contextual tokens of one crop, arXiv 2412.04467, section 3.2.

    Args:
        attention: `[N]` attention of the class token to each patch.
        keys: `[N, d]` keys, mean over heads.
        dominant, contextual: Number of tokens of each type.

    Returns:
        tuple: `[dominant]` rows, `[contextual]` target rows, and `[N - dominant, contextual]` one-hot assignment of the
        other patches, in raster order, to targets.
    """
    best = attention.topk(dominant).indices
    rest = torch.ones(len(attention), dtype=torch.bool, device=attention.device)
    rest[best] = False
    others = rest.nonzero()[:, 0]
    targets = others[:: max(1, len(others) // contextual)][:contextual]
    unit = normalize(keys.float(), dim=-1)
    belongs = one_hot((unit[others] @ unit[targets].T).argmax(1), contextual)
    return best, targets, belongs


@dataclass
class PlainDivPrune(DivPrune):
    """DivPrune with the plain loop."""

    def choose(self, tokens: Tokens) -> Choice:
        keep = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.hidden.device)
        bounds = tokens.offsets.tolist()
        for start, end, count in zip(bounds, bounds[1:], tokens.budgets.tolist(), strict=False):
            keep[start + divprune(tokens.hidden[start:end], count)] = True
        return Choice(keep)


@dataclass
class PlainCDPruner(CDPruner):
    """CDPruner with the plain loop, crop by crop; the relevance is the same."""

    def choose(self, tokens: Tokens) -> Choice:
        relevance = self.in_kernel(self.text_relevance(tokens))
        keep = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.hidden.device)
        for rows, count, _ in by_crop(tokens, crops_seen(tokens, self.name)).each():
            if count:
                keep[rows[cdpruner(tokens.hidden[rows], relevance[rows], count)]] = True
        return Choice(keep, scores=relevance)


@dataclass
class PlainVisionZip(VisionZip):
    """VisionZip with the plain selection, crop by crop; merging is a one-hot product, as in the released code."""

    def choose(self, tokens: Tokens) -> Choice:
        vision = Vision(tokens, self.name)
        scores = vision.importance()
        metric = vision.tokens_of_patches(lambda a: a.key.float().mean(1), rope=False)
        features = vision.to_tokens(vision.features).float()
        keep = torch.zeros(len(tokens), dtype=torch.bool, device=scores.device)
        columns, states = [], []
        for rows, budget, placed in by_crop(tokens, vision.crop).each():
            count = round(self.contextual * budget)
            if not placed or budget == len(rows) or not count:
                keep[rows[scores[rows].sort(descending=True, stable=True).indices[:budget]]] = True
                continue
            best, targets, belongs = visionzip(scores[rows], metric[rows], budget - count, count)
            keep[rows[best]] = keep[rows[targets]] = True
            others = torch.ones(len(rows), dtype=torch.bool, device=keep.device)
            others[best] = False
            weights = belongs.float()
            weights[torch.isin(others.nonzero()[:, 0], targets)] = 0
            total = weights.T @ features[rows[others]]
            states.append(features[rows[targets]] + total / weights.sum(0).clamp_min(1)[:, None])
            columns.append(rows[targets])
        if not states:
            return Choice(keep, scores=scores)
        projected = vision.project(torch.cat(states))
        if projected is None:
            raise MethodError("the plain VisionZip merges before the projector; this one takes whole images only")
        hidden = tokens.hidden.clone()
        hidden[torch.cat(columns)] = projected.to(hidden)
        return Choice(keep, hidden, scores)


PLAIN: dict[str, type[Method]] = {
    "divprune": PlainDivPrune,
    "cdpruner": PlainCDPruner,
    "visionzip": PlainVisionZip,
}
BOTH = [text for name in PLAIN for text in (name, f"plain-{name}")]  # vtprune's method and the plain loop


def register_all() -> None:
    """Registers the plain loops as methods."""
    for name, method in PLAIN.items():
        register(f"plain-{name}")(method)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vtprune bench` with the plain loops among its methods; its exit code."""
    register_all()
    words = list(sys.argv[1:] if argv is None else argv)
    if "--methods" in words:
        place = words.index("--methods") + 1
        return cli.main(["bench", *words[:place], *BOTH, *words[place:]])
    return cli.main(["bench", *words, "--methods", "iwp", *BOTH])


if __name__ == "__main__":
    sys.exit(main())
