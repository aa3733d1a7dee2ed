# SPDX-License-Identifier: Apache-2.0
"""Merging dropped tokens by cells of the image grid (VFlowOpt, arXiv 2508.05211)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.ragged import rank_in_group

if TYPE_CHECKING:
    from ...core.tokens import Tokens


def grid_cells(row: Tensor, col: Tensor, crop: Tensor, a: float) -> Tensor:
    """`[M]` recycling cell of each token, by crop, `floor(row / a)`, `floor(col / a)`; -1 outside the grid."""
    keys = torch.stack([crop, *(torch.floor(place.float() / a).long() for place in (row, col))])
    cell = torch.unique(torch.where(row >= 0, keys, -1), dim=1, return_inverse=True)[1]
    return torch.where(row >= 0, cell, -1)


def fitting_cells(row: Tensor, col: Tensor, crop: Tensor, a: float, budget: int) -> Tensor:
    """`grid_cells` whose side is doubled until there are at most `budget` of them."""
    while True:
        cell = grid_cells(row, col, crop, a)
        if int(cell.max()) < budget:
            return cell
        if a > max(int(row.max()), int(col.max())):
            return torch.full_like(cell, -1)  # more crops than tokens to keep: no merging
        a *= 2


def mark_exactly(importance: Tensor, cell: Tensor, keep: int) -> Tensor:
    """`[M]` bool, the least important tokens: as many as leave `keep` when each cell merges its marked ones into one.

    The first mark of a cell removes no token, every further one removes one, so some number of marks always fits,
    unless there are more cells than `keep`.
    """
    order = rank_in_group(importance, torch.tensor([0, len(importance)], device=importance.device)).argsort().flip(0)
    inside = cell[order]
    place = torch.arange(len(order), device=order.device)
    firsts = torch.full((int(cell.max()) + 2,), len(order), device=order.device)
    firsts.scatter_reduce_(0, inside + 1, place, "amin")
    loses = (firsts[inside + 1] != place) | (inside < 0)
    count = int((loses.cumsum(0) < len(order) - keep).sum()) + 1
    marked = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    marked[order[:count]] = True
    return marked


def recycle(
    features: Tensor, importance: Tensor, cell: Tensor, marked: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merges the marked tokens of each cell into its most important one, weighted by importance.

    Args:
        features: `[M, D]`.
        importance: `[M]`.
        cell: `[M]` from `grid_cells`.
        marked: `[M]` bool.

    Returns:
        tuple: `[M]` bool mask of kept tokens; `[M, D]` float32 features with the merged ones in place; `[M]` merge
        group of every token, in the order of the cells, -1 where not marked; `[G]` row that each group was merged into.
    """
    used, group = torch.unique(torch.where(marked & (cell >= 0), cell, -1), return_inverse=True)
    group = group - int(used[0] < 0)  # -1 comes first
    members = (group >= 0).nonzero()[:, 0]
    groups = group[members]
    count = int(groups.max()) + 1 if len(groups) else 0
    offsets = torch.nn.functional.pad(torch.bincount(groups, minlength=count).cumsum(0), (1, 0))
    by_group = members[groups.sort(stable=True).indices]
    best = by_group[rank_in_group(importance[by_group], offsets) == 0]
    weight = importance.float()[members].clamp_min(torch.finfo(torch.float32).tiny)
    weight = weight / weight.new_zeros(count).index_add_(0, groups, weight)[groups]
    merged = features.float().clone()
    merged[best] = merged.new_zeros(count, merged.shape[1]).index_add_(0, groups, weight[:, None] * merged[members])
    keep = ~marked
    keep[best] = True
    return keep, merged, group, best


def recycle_single_images(tokens: Tokens, importance: Tensor, keep: Tensor, a: float) -> Tensor | None:
    """Recycles the dropped tokens of images that are alone in their sample, as released.

    Args:
        tokens: Tokens of the stage, one group for each image.
        importance: `[M]`.
        keep: `[M]` bool, changed in place for these images only.
        a: Side of the cells of the grid.

    Returns:
        Tensor: `[M, D]` states with merged ones in place, or None where nothing was recycled.
    """
    hidden = tokens.hidden
    firsts = tokens.sample[tokens.offsets[:-1].clamp_max(len(tokens) - 1)]
    bounds = tokens.offsets.tolist()
    for number, (start, stop, budget) in enumerate(zip(bounds, bounds[1:], tokens.budgets.tolist(), strict=False)):
        here = slice(start, stop)
        alone = int((firsts == firsts[number]).sum()) == 1
        if not alone or budget == stop - start or bool((tokens.frame[here] > 0).any()):
            continue
        cell = fitting_cells(tokens.grid_row[here], tokens.grid_col[here], tokens.crop[here], a, budget)
        marked = mark_exactly(importance[here], cell, budget)
        keep[here], merged, _, best = recycle(hidden[here], importance[here], cell, marked)
        hidden = hidden.clone() if hidden is tokens.hidden else hidden
        hidden[start + best] = merged[best].to(hidden)
    return None if hidden is tokens.hidden else hidden
