# SPDX-License-Identifier: Apache-2.0
"""Recycling of dropped tokens: the best of them are clustered, and each cluster is replaced by its mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.ragged import rank_in_group, top_k

_BLOCK = 1 << 22  # distances in memory at once


def density_peaks(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Clusters rows around dense ones that are far from any denser row (density peaks, Rodriguez and Laio 2014).

    Distances are Euclidean, divided by the root of the width. Density is `exp(-mean d^2)` to the `clusters` nearest
    rows (a row is its own nearest); a row's score is its density times the distance to the nearest denser row (for the
    densest, the largest distance of all). Of equal rows the earlier one counts as denser.

    Args:
        x: `[m, D]`.
        clusters: Number of clusters, at most `m`.

    Returns:
        tuple: `[m]` int64 cluster of each row, and `[clusters]` int64 rows of the centers, by descending score.
    """
    x = x.float()
    blocks = torch.arange(len(x), device=x.device).split(max(1, _BLOCK // len(x)))

    def distances(rows: Tensor, others: Tensor) -> Tensor:
        # Without matrix products, whose rounding gives equal rows distances above 0.
        return torch.cdist(x[rows], x[others], compute_mode="donot_use_mm_for_euclid_dist") * x.shape[1] ** -0.5

    everything = torch.arange(len(x), device=x.device)
    whole = distances(everything, everything) if len(blocks) == 1 else None
    nearest, largest = [], []
    for rows in blocks:
        distance = distances(rows, everything) if whole is None else whole  # [r, m]
        nearest.append(distance.topk(clusters, dim=1, largest=False).values.square().mean(1))
        largest.append(distance.max())
    density = torch.exp(-torch.cat(nearest))
    gaps = []
    for rows in blocks:
        distance = distances(rows, everything) if whole is None else whole
        own, place = density[rows, None], rows[:, None]
        # Rows that differ may be equally dense, too: with two clusters, the closest pair always is.
        denser = (density > own) | ((density == own) & (everything < place) & (distance == 0))
        gaps.append(torch.where(denser, distance, torch.stack(largest).max()).min(dim=1).values)
    gap = torch.cat(gaps)
    centers = (gap * density).sort(descending=True, stable=True).indices[:clusters]
    # Ties go to the earlier center.
    group = torch.cat([distances(rows, centers).sort(dim=1, stable=True).indices[:, 0] for rows in blocks])
    group[centers] = torch.arange(clusters, device=x.device)
    return group, centers


def recycled(dropped: int) -> tuple[int, int]:
    """Number of `dropped` tokens to recycle, and of clusters to merge them into, as released."""
    members = min(int(0.3 * dropped) + 1, dropped)
    return members, min(members // 10 + 1, members)


def with_clusters(counts: Sequence[int], total: int) -> list[int]:
    """Tokens left of `total` after each cut, as released: `counts` of them by score, and the clusters."""
    left = [total]
    for count in counts:
        kept = min(count, left[-1] - 1)
        left.append(kept + recycled(left[-1] - kept)[1])
    return left[1:]


def split_budget(total: int, budget: int) -> tuple[int, int]:
    """Splits a budget into kept tokens and clusters: as many clusters as the release makes of the dropped tokens.

    A budget that is too small for them and a kept token is halved.
    """
    kept = budget
    while kept + recycled(total - kept)[1] > budget and kept > 0:  # the sum falls by 0 or 1 with each step
        kept -= 1
    clusters = budget - kept if kept else budget // 2
    return budget - clusters, clusters


def recycle(
    hidden: Tensor, scores: Tensor, recycle_by: Tensor, offsets: Tensor, budgets: Tensor
) -> tuple[Tensor, Tensor]:
    """Keeps the best tokens and merges the best of the rest into clusters, together exactly the budget of each group.

    Args:
        hidden: `[M, D]` states.
        scores: `[M]` scores by which tokens are kept.
        recycle_by: `[M]` scores by which the others are recycled.
        offsets: `[S + 1]` offsets of the groups.
        budgets: `[S]` counts.

    Returns:
        tuple: `[M]` bool, the kept tokens and the centers of the clusters; `[M, D]` states, with each
        center replaced by the mean of its cluster.
    """
    edges = offsets.tolist()
    groups = list(zip(edges[:-1], edges[1:], strict=True))
    splits = [split_budget(end - start, b) for (start, end), b in zip(groups, budgets.tolist(), strict=True)]
    keep = top_k(scores, offsets, torch.tensor([kept for kept, _ in splits]))
    rest = rank_in_group(recycle_by.masked_fill(keep, -torch.inf), offsets)
    out = hidden.clone()
    for (start, end), (kept, clusters) in zip(groups, splits, strict=True):
        if clusters == 0:
            continue
        members = max(recycled(end - start - kept)[0], clusters)
        rows = start + rest[start:end].argsort()[:members]  # by descending score
        group, centers = density_peaks(hidden[rows], clusters)
        total = torch.zeros(clusters, hidden.shape[1], device=hidden.device, dtype=torch.float32).index_add_(
            0, group, hidden[rows].float()
        )
        out[rows[centers]] = (total / torch.bincount(group, minlength=clusters)[:, None]).to(hidden.dtype)
        keep[rows[centers]] = True
    return keep, out
