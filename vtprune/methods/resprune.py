# SPDX-License-Identifier: Apache-2.0
"""ResPrune: selects the tokens that best reconstruct all tokens linearly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune_kernels import dpp_map, residual_pivots

from ..core.method import Choice, Method, Stage
from ..core.options import Count
from ..core.ragged import from_order
from ..core.registry import register
from ..core.tokens import Tokens

SHALLOW = 16  # layers; in a shallower decoder one layer is too large a share of the cost


@register("resprune")
@dataclass
class ResPrune(Method):
    """Keeps tokens by greedy selection on residual energy, before the decoder or its second layer.

    Paper: ResPrune, arXiv 2603.21105. Reads only the hidden states at the cut; all pictures of a sample are one group.
    Every pick is the token with the largest energy `|x_i - P x_i|^2` outside the span of the tokens picked before: QR
    with column pivoting of the transposed states. The share of all tokens' energy that the picks explain grows about
    as fast as for any selection of tokens.

    Differences from the paper, for which no code was released: the paper cuts before the decoder (`layer=0`). Here
    decoders of 16 layers or more are cut before layer 1, because the first layer of a real decoder separates rare
    tokens from frequent ones (measured in docs/choosing.md). Tokens are not weighted by their relevance to the text;
    rows are not normalized; when the picks explain all tokens, the others follow by energy; newline tokens are not
    candidates and are dropped first.

    Attributes:
        layer: The cut is before this decoder layer; a decoder with fewer layers is cut before its last one. By default
            layer 1, and 0 in decoders of fewer than 16 layers.
        unit: Normalize every token first, so that only directions count.
        center: Subtract the mean token of each group first.
        positions: `"compact"` renumbers the kept tokens 0, 1, 2, ...; by default they keep their position ids. Not for
            models with position ids on several axes (M-RoPE).
    """

    layer: Count | None = None
    unit: bool = False
    center: bool = False
    positions: Literal["original", "compact"] = "original"

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        layer = int(num_layers >= SHALLOW) if self.layer is None else min(self.layer, num_layers - 1)
        return (Stage(layer, 0.1112),)

    def choose(self, tokens: Tokens) -> Choice:
        features = tokens.placed_hidden
        if self.center:
            features = centered(features, tokens.group, len(tokens.offsets) - 1)
        groups = tokens.offsets, tokens.budgets, tokens.max_budget, tokens.max_length
        if self.unit:  # lengths that are equal exactly: those of normalized rows differ by rounding
            order = dpp_map(features, torch.ones(len(features), device=features.device, dtype=torch.float32), *groups)
        else:
            order = residual_pivots(features, None, *groups)
        return Choice(from_order(order, len(tokens)))


def centered(features: Tensor, group: Tensor, groups: int) -> Tensor:
    """`[M, D]` float32 features minus the mean of their group; rows of zeros are left alone and not counted.

    Args:
        features: `[M, D]`.
        group: `[M]` group of each row.
        groups: Number of groups.
    """
    features = features.float()
    nonzero = (features != 0).any(1, keepdim=True)
    count = features.new_zeros(groups, 1).index_add_(0, group, nonzero.to(features))
    mean = features.new_zeros(groups, features.shape[1]).index_add_(0, group, features) / count.clamp_min(1)
    return torch.where(nonzero, features - mean[group], 0)
