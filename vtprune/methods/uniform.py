# SPDX-License-Identifier: Apache-2.0
"""Evenly spaced tokens: what plain downsampling of the grid would keep."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Choice, Method, Stage, Tokens
from .registry import register


def spread(sizes: Tensor, count: int) -> Tensor:
    """Shares `count` picks over consecutive bins as evenly as integers allow, in proportion to the bins' sizes.

    Args:
        sizes: `[n]` int64 sizes of the bins.
        count: Picks, at most `sizes.sum()`.

    Returns:
        Tensor: `[n]` int64 that sums to `count`; no bin gets more than its size. With bins of size 1 it marks `count`
        places with equal, centred gaps.
    """
    total = int(sizes.sum())
    if total == 0:
        return torch.zeros_like(sizes)
    edges = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return ((2 * edges * count + total) // (2 * total)).diff()  # rounds edges * count / total


def spread_grid(rows: Tensor, count: int) -> Tensor:
    """Picks `count` cells of a grid whose rows and columns are as evenly covered as the count allows.

    Args:
        rows: `[n]` row number of each cell, cells in raster order.
        count: Picks, at most `n`.

    Returns:
        Tensor: `[n]` bool.
    """
    lengths = torch.unique_consecutive(rows, return_counts=True)[1]
    height, width = len(lengths), len(rows) / len(lengths)
    # Equal gaps in both directions: used rows / height = picks per used row / width.
    used = min(max(round(math.sqrt(count * height / width)), math.ceil(count / width)), height, max(count, 1))
    lines = spread(torch.ones_like(lengths), used)
    while int((lengths * lines).sum()) < count:  # rows of unequal lengths: the chosen ones may be the short ones
        used += 1
        lines = spread(torch.ones_like(lengths), used)
    picks = spread(lengths * lines, count)
    marks = [spread(torch.ones(n, dtype=torch.int64), k) for n, k in zip(lengths.tolist(), picks.tolist(), strict=True)]
    return torch.cat(marks) > 0


@register("uniform")
@dataclass
class Uniform(Method):
    """Keeps an evenly spaced subset of each pool, before the decoder.

    No paper; the control for methods that claim to know which tokens matter. Each image, frame and crop of a pool gets
    its proportional share of the budget (long videos: evenly over time), and inside it as regular a sub-grid as the
    exact count allows. Tokens without a place in a grid (newlines, separators, models that tell no geometry) are
    spaced by their index in a group of their own per image and frame.
    """

    def schedule(self, num_layers: int) -> tuple[Stage, ...]:
        return (Stage(0),)

    def choose(self, tokens: Tokens) -> Choice:
        crop = torch.where(tokens.row < 0, -1, tokens.crop)
        keys = torch.stack([tokens.pool, tokens.image, tokens.frame, crop]).cpu()  # [4, M]
        groups, group = torch.unique(keys, dim=1, return_inverse=True)  # sorted: pools first
        rows = tokens.row.cpu()
        sizes = torch.bincount(group, minlength=groups.shape[1])
        keep = torch.zeros(len(tokens), dtype=torch.bool)
        members = torch.sort(group, stable=True).indices.split(sizes.tolist())
        for pool, budget in enumerate(tokens.budgets.tolist()):
            mine = (groups[0] == pool).nonzero().flatten()
            for number, count in zip(mine.tolist(), spread(sizes[mine], budget).tolist(), strict=True):
                where = members[number]
                if groups[3, number] < 0:
                    marked = spread(torch.ones_like(where), count) > 0
                else:
                    where = where[torch.sort(rows[where], stable=True).indices]
                    marked = spread_grid(rows[where], count)
                keep[where[marked]] = True
        return Choice(keep.to(tokens.hidden.device))
