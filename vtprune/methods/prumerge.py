# SPDX-License-Identifier: Apache-2.0
"""PruMerge and PruMerge+: the patches that the class token attends to, each merged with its neighbors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.log import warn_once
from ..core.method import Choice, Method, Stage, Tap
from ..core.options import Count, Range
from ..core.ragged import settle_ties
from ..core.registry import register
from ..core.tokens import Tokens
from ..vision.crops import by_crop
from ..vision.tower import Attention, Vision, layer_tap, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


def neighbors(keys: Tensor, kept: Tensor, count: int = 32) -> Tensor:
    """`[K, count]` rows most similar to each kept row by cosine of keys `[N, C]`, without itself; ascending."""
    unit = normalize(keys.float(), dim=-1)
    similar = unit[kept] @ unit.T  # [K, N]
    similar[torch.arange(len(kept), device=kept.device), kept] = -torch.inf
    nearest = similar.sort(dim=1, descending=True, stable=True).indices[:, : min(count, len(keys) - 1)]
    return nearest.sort(1).values


def merge(features: Tensor, attention: Tensor, kept: Tensor, near: Tensor, average: bool = False) -> Tensor:
    """Merges neighbors into the kept rows, and all rows that are not kept into one extra row.

    Args:
        features: `[N, F]`.
        attention: `[N]` weights.
        kept: `[K]` rows.
        near: `[K, n]` neighbors of each.
        average: Divide by the sum of the weights (a kept row weighs 1); the release does not.

    Returns:
        Tensor: `[K + 1, F]`: `x_i + sum_j a_j x_j` in the order of `kept`, then `sum_{not kept} a_j x_j`.
    """
    features, attention = features.float(), attention.float()
    weights = features.new_zeros(len(kept) + 1, len(features))
    weights[:-1].scatter_(1, near, attention[near])
    weights[-1] = attention
    weights[-1, kept] = 0
    weights[torch.arange(len(kept), device=kept.device), kept] = 1
    if average:
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return weights @ features


def outlier_ratio(attention: Tensor) -> float:
    """Share of the values of `[N]` above the third quartile by more than 1.5 interquartile ranges."""
    first, third = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return int((attention > third + 1.5 * (third - first)).sum()) / len(attention)


def grid_places(total: int, ratio: float) -> Tensor:
    """Patches that PruMerge+ adds for an adaptive ratio: every `int(int(1 / ratio) / 3)`-th, except the last one.

    The released code divides by zero where there is no outlier and has no step above ratio 1/3; both give step 1 here.
    """
    return torch.arange(0, total - 1, max(1, int(int(1 / ratio) / 3)) if ratio > 0 else 1)


def one_head(attention: Attention) -> Attention:
    """Joins all heads of a layer's queries and keys into one head of the full width."""
    query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (attention.query, attention.key))  # [B, 1, N, H dh]
    return replace(attention, query=query, key=key, scaling=query.shape[-1] ** -0.5)


@register("prumerge")
@dataclass
class PruMerge(Method):
    """Keeps the patches with the largest class-token attention and a grid of others, each merged with its neighbors.

    Paper: LLaVA-PruMerge, arXiv 2403.15388 (ICCV 2025), method section. Stage: the projector, hence before the
    decoder. Reads queries and keys of the LAST vision layer, taken as one head, and the features before the projector.
    A kept patch becomes `x_i + sum_j a_j x_j` over its 32 nearest others by key cosine, `a` the class-token attention
    (without a class token: the mean attention received); an extra token is `sum a_j x_j` over all patches that are not
    kept. They go through the projector. PruMerge+ (`plus`, the release's default) keeps fewer by attention and adds an
    even grid. Kept patches stay where they are; the extra token takes the first free place of its crop.

    Differences from the release: there the number of outliers decides how many tokens stay (`outlier_ratio`,
    `grid_places`); here the budget is given and exact, the extra token counts, and the budget is divided among the
    crops of a sample by their outliers (`adaptive`); order in the image is kept (there: by attention, then grid, then
    extra); any-resolution layouts work, newlines being dropped first; where a projector accepts whole images only, its
    output is merged.

    Attributes:
        plus: PruMerge+; False is PruMerge.
        important: Share of the kept patches that PruMerge+ picks by attention (about a quarter in the release).
        near: Number of neighbors merged into a kept patch.
        adaptive: Give crops with more outliers more of the budget.
        average: Merge by weighted averages; the released sums are not normalized.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ..., as the release does; by default they keep their
            position ids. Not for models with position ids on several axes (M-RoPE).
    """

    differentiable = True
    plus: bool = True
    important: Annotated[float, Range(0, 1, open=(0,))] = 0.25
    near: Count = 32
    adaptive: bool = True
    average: bool = False
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 1 / 14.4),)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "last"))

    def choose(self, tokens: Tokens) -> Choice:
        vision = Vision(tokens, self.name)
        scores = vision.importance(one_head)
        keys = vision.tokens_of_patches(lambda a: one_head(a).key[:, 0], rope=False)  # [M, H dh]
        crops = by_crop(tokens, vision.crop)
        if self.adaptive:
            weights = torch.ones_like(scores)
            for rows, _, placed in crops.each():
                weights[rows] = max(outlier_ratio(scores[rows]) * len(rows), 1.0) if placed else 1.0
            crops = by_crop(tokens, vision.crop, weights)
        keep = torch.zeros(len(tokens), dtype=torch.bool, device=scores.device)
        groups = []
        for rows, budget, placed in crops.each():
            if not placed or budget == len(rows) or budget == 0:
                keep[rows[:budget]] = True
                continue
            kept = self._pick(scores[rows], max(budget - 1, 1))
            keep[rows[kept]] = True
            extra = rows[~keep[rows]][: budget - len(kept)]
            keep[extra] = True
            groups.append((rows, kept, neighbors(keys[rows], kept, self.near), extra))
        return Choice(keep, self._states(tokens, vision, scores, groups), scores)

    def _pick(self, scores: Tensor, count: int) -> Tensor:
        """`[count]` patches of one crop: the highest scores, then (PruMerge+) evenly spaced ones of the rest."""
        order = settle_ties(scores).sort(descending=True, stable=True).indices
        best = max(1, round(self.important * count)) if self.plus else count
        rest = order[best:].sort().values
        spaced = (2 * torch.arange(count - best, device=rest.device) + 1) * len(rest) // (2 * max(count - best, 1))
        return torch.cat([order[:best], rest[spaced]])

    def _states(self, tokens: Tokens, vision: Vision, scores: Tensor, groups: list) -> Tensor | None:
        """`[M, D]` states of the visual tokens with the merged ones in place; None where nothing is merged."""
        if not groups:
            return None
        changed = torch.cat([torch.cat([rows[kept], extra]) for rows, kept, _, extra in groups])

        def merged(states: Tensor, average: bool) -> Tensor:
            parts = [
                merge(states[rows], scores[rows], kept, near, average)[: len(kept) + len(extra)]
                for rows, kept, near, extra in groups
            ]
            return torch.cat(parts)

        projected = vision.project(merged(vision.to_tokens(vision.features), self.average))
        if projected is None:
            warn_once(f"{self.name}: the projector accepts whole images only, so its outputs are averaged instead")
            projected = merged(tokens.hidden, True)
        hidden = tokens.hidden.clone()
        hidden[changed] = projected.to(hidden)
        return hidden
