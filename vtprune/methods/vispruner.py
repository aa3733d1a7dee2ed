# SPDX-License-Identifier: Apache-2.0
"""VisPruner: the patches that the class token attends to, and of the rest those without near-duplicates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..core.method import Choice, Method, Stage, Tap
from ..core.options import Positive, Share
from ..core.ragged import pairwise_cosines, settle_ties
from ..core.registry import register
from ..core.tokens import Tokens
from ..vision.crops import by_crop
from ..vision.tower import Queries, Vision, layer_tap, projector_tap

if TYPE_CHECKING:
    from ..models.anatomy import Anatomy


def remove_duplicates(features: Tensor, order: Tensor, count: int, step: int = 8) -> Tensor:
    """Removes near-duplicates from a list, `step` per round, until `count` rows remain.

    Each round splits the list into its even and odd entries and removes the even ones most similar to some odd one; the
    next list is the remaining even ones, by descending similarity, then the odd ones.

    Args:
        features: `[n, F]`.
        order: `[R]` rows of `features`, by descending importance.
        count: Number of rows to keep, at most `R`.
        step: Rows removed per round.

    Returns:
        Tensor: `[count]` rows, in the final order of the list.
    """
    similar = pairwise_cosines(features[order].float())
    left = torch.arange(len(order), device=order.device)
    while len(left) > count:
        if 4 * len(left) < 3 * len(similar):  # what is gone is not read again
            similar, order = similar[left].index_select(1, left), order[left]
            left = torch.arange(len(order), device=order.device)
        even, odd = left[0::2], left[1::2]
        if len(odd) == 0:
            return order[left[:count]]
        nearest = similar[odd].amax(0)[even]
        by_similarity = even[nearest.sort(descending=True, stable=True).indices]
        left = torch.cat([by_similarity[min(step, len(left) - count) :], odd])
    return order[left]


def select(features: Tensor, scores: Tensor, budget: int, important: int, step: int = 8) -> tuple[Tensor, Tensor]:
    """Important rows by descending score `[important]`, and diverse ones `[budget - important]` of the rest."""
    order = settle_ties(scores).sort(descending=True, stable=True).indices
    return order[:important], remove_duplicates(features, order[important:], budget - important, step)


@register("vispruner")
@dataclass
class VisPruner(Method):
    """Keeps important patches by class-token attention, and diverse ones by removing near-duplicates, crop by crop.

    Paper: VisPruner, arXiv 2412.01818 (ICCV 2025), method section. Stage: before the decoder. Reads queries and keys of
    the vision layer whose output is projected, and the features before the projector. Of a budget `T`, `int(T * share)`
    patches have the largest class-token attention, mean over heads (without a class token: mean attention received).
    The rest, by descending attention, is thinned by cosine similarity until `T` is met (`remove_duplicates`).

    Thinning is sensitive to rounding: one swapped neighbor changes all later rounds, so that half-precision features
    can change a third of the kept set. Everything after the model is float32 here.

    Differences from the release: lists of odd length and lists shorter than a step work; crops share the exact budget
    evenly; any-resolution layouts keep their unpadding, newlines being dropped first; above `largest` patches the step
    grows, because the published one needs `n / 8` rounds over all pairs.

    Attributes:
        important: Share of the budget for patches picked by attention.
        step: Patches removed per round.
        largest: In crops of `n` patches, more than this, `step * n / largest` are removed per round.
        queries: Without a class token, the query rows that the mean attention received is taken over: `"auto"` takes
            all, and a stratified sample of 512 in pictures of 2,048 patches or more; a number takes that many.
            The thinning answers to a sample as to any rounding: about a third of the set changes
            (`benchmarks/received.py`; 2 % for `visionzip`).
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ..., as the release does; by default they keep their
            position ids. Not for models with position ids on several axes (M-RoPE).
    """

    important: Share = 0.5
    step: Positive = 8
    largest: Positive = 2048
    queries: Queries = "auto"
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 64 / 576),)

    def taps(self, anatomy: Anatomy) -> Iterable[Tap]:
        return (projector_tap(anatomy, self.name), layer_tap(anatomy, "feature"))

    def choose(self, tokens: Tokens) -> Choice:
        vision = Vision(tokens, self.name)
        scores, features = vision.importance(queries=self.queries), vision.to_tokens(vision.features)
        keep = torch.zeros(len(tokens), dtype=torch.bool, device=scores.device)
        for rows, budget, placed in by_crop(tokens, vision.crop).each():
            if not placed or budget == len(rows):
                keep[rows[:budget]] = True
                continue
            step = max(self.step, self.step * len(rows) // self.largest)
            for chosen in select(features[rows], scores[rows], budget, int(budget * self.important), step):
                keep[rows[chosen]] = True
        return Choice(keep, scores=scores)
