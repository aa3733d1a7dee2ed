# SPDX-License-Identifier: Apache-2.0
"""From scores to a keep mask, under an exact budget per pool. Pure tensor functions over the ragged batch."""

from __future__ import annotations

import torch
from torch import Tensor


def group_ids(offsets: Tensor, total: int | None = None) -> Tensor:
    """Returns `[M]`: the pool number of every row.

    Args:
        offsets: `[S + 1]` offsets.
        total: `M`, where it is known; without it, the host waits for a device that holds the offsets.
    """
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths, output_size=total)


def rank_in_group(scores: Tensor, offsets: Tensor) -> Tensor:
    """Rank of every row inside its pool: 0 for the largest score, equal scores in order of the row number.

    Args:
        scores: `[M]`, any float dtype.
        offsets: `[S + 1]` offsets.

    Returns:
        Tensor: `[M]` int64.
    """
    pools = group_ids(offsets, len(scores))
    by_score = torch.sort(scores, descending=True, stable=True).indices
    order = by_score[torch.sort(pools[by_score], stable=True).indices]  # [M] grouped by pool, best first
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - offsets[:-1][pools]
    return rank


def top_k(scores: Tensor, offsets: Tensor, budgets: Tensor) -> Tensor:
    """Keeps the `budgets[s]` largest scores of each pool; ties go to the smaller row.

    Args:
        scores: `[M]`.
        offsets: `[S + 1]` offsets.
        budgets: `[S]` counts.

    Returns:
        Tensor: `[M]` bool.
    """
    return rank_in_group(scores, offsets) < budgets.to(scores.device)[group_ids(offsets, len(scores))]


def from_order(order: Tensor, total: int) -> Tensor:
    """Keep mask `[total]` from chosen row numbers in any order; negative entries are padding."""
    # Padding marks one row more, which is cut off again: picking out the others would wait for the device.
    keep = torch.zeros(total + 1, dtype=torch.bool, device=order.device)
    return keep.scatter_(0, torch.where(order < 0, total, order).flatten(), True)[:total]


def seeded_scores(offsets: Tensor, seed: int) -> Tensor:
    """`[M]` uniform draws in [0, 1) from a generator that starts afresh with `seed` for every group.

    The draws are made on the CPU, so that every device gets the same; the global generator is neither read nor moved.
    """
    draws = []
    for length in offsets.diff().tolist():
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.rand(length, generator=generator))
    return torch.cat(draws).to(offsets.device) if draws else torch.zeros(0, device=offsets.device)
