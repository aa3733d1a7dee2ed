# SPDX-License-Identifier: Apache-2.0
"""Residual selection: the tokens from which the others can best be rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune_kernels import residual_pivots

from ..core.method import Choice, Method, Stage
from ..core.ragged import from_order
from ..core.registry import register
from ..core.tokens import Tokens


@register("resprune")
@dataclass
class ResPrune(Method):
    """Greedy selection by residual energy, before the decoder.

    Paper: ResPrune, arXiv 2603.21105. Reads only the visual embeddings in the prompt; all pictures of a sample are one
    group. Every pick is the token with the largest energy `|x_i - P x_i|^2` outside the span of the tokens picked
    before: QR with column pivoting of the transposed features. What the picks explain of all tokens' energy grows
    about as fast as picks of whole tokens can make it.

    Differences from the paper, for which no code was released: tokens are not weighted by their relevance to the text;
    rows keep their lengths; a token of which less than 1e-6 of its own energy is left counts as explained, and such
    tokens come last, by energy; newline tokens take no part and go first.

    Attributes:
        unit: Directions only: every token is divided by its length first.
        center: The mean token of each group is subtracted first.
        positions: `"compact"` renumbers the survivors 0, 1, 2, ...; by default they keep their positions. Not for
            models that place tokens on several axes.
    """

    unit: bool = False
    center: bool = False
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0, 0.1112),)

    def choose(self, tokens: Tokens) -> Choice:
        features = tokens.placed_hidden
        if self.center:
            features = centered(features, tokens.group, len(tokens.offsets) - 1)
        if self.unit:
            features = torch.nn.functional.normalize(features.float(), dim=-1)
        order = residual_pivots(features, None, tokens.offsets, tokens.budgets, tokens.max_budget, tokens.max_length)
        return Choice(from_order(order, len(tokens)))


def centered(features: Tensor, group: Tensor, groups: int) -> Tensor:
    """`[M, D]` float32 features less the mean of their group; rows of zeros stay and do not count.

    Args:
        features: `[M, D]`.
        group: `[M]` group of each row.
        groups: Their number.
    """
    features = features.float()
    shown = (features != 0).any(1, keepdim=True)
    count = features.new_zeros(groups, 1).index_add_(0, group, shown.to(features))
    mean = features.new_zeros(groups, features.shape[1]).index_add_(0, group, features) / count.clamp_min(1)
    return torch.where(shown, features - mean[group], 0)
