# SPDX-License-Identifier: Apache-2.0
"""Kept patches with their nearest neighbours folded in (LLaVA-PruMerge, arXiv 2403.15388)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def neighbours(keys: Tensor, kept: Tensor, count: int = 32) -> Tensor:
    """`[K, count]` rows most similar to each kept row by cosine of keys `[N, C]`, itself left out; ascending."""
    unit = normalize(keys.float(), dim=-1)
    similar = unit[kept] @ unit.T  # [K, N]
    similar[torch.arange(len(kept), device=kept.device), kept] = -torch.inf
    nearest = similar.sort(dim=1, descending=True, stable=True).indices[:, : min(count, len(keys) - 1)]
    return nearest.sort(1).values


def merge(features: Tensor, attention: Tensor, kept: Tensor, near: Tensor, average: bool = False) -> Tensor:
    """Folds neighbours into the kept rows, and all rows that are not kept into one more.

    Args:
        features: `[N, F]`.
        attention: `[N]` weights.
        kept: `[K]` rows.
        near: `[K, n]` neighbours of each.
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
