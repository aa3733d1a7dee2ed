# SPDX-License-Identifier: Apache-2.0
"""Integer counts, spread evenly over bins and grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def spread(sizes: Tensor, count: int) -> Tensor:
    """Distributes `count` picks over consecutive bins as evenly as integers allow, in proportion to the bins' sizes.

    Args:
        sizes: `[n]` int64 sizes of the bins.
        count: Picks, at most `sizes.sum()`.

    Returns:
        Tensor: `[n]` int64 that sums to `count`; no bin gets more than its size. With bins of size 1 it marks `count`
        places with equal, centered gaps.
    """
    total = int(sizes.sum())
    if total == 0:
        return torch.zeros_like(sizes)
    edges = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return ((2 * edges * count + total) // (2 * total)).diff()  # rounds edges * count / total


def spread_grid(rows: Tensor, count: int) -> Tensor:
    """Picks `count` cells of a grid, covering its rows and columns as evenly as possible.

    Args:
        rows: `[n]` row number of each cell, cells in raster order.
        count: Picks, at most `n`.

    Returns:
        Tensor: `[n]` bool.
    """
    lengths = torch.unique_consecutive(rows, return_counts=True)[1]
    height, width = len(lengths), len(rows) / len(lengths)
    # For equal gaps in both directions: used rows / height = picks per used row / width.
    used = min(max(round(math.sqrt(count * height / width)), math.ceil(count / width)), height, max(count, 1))
    lines = spread(torch.ones_like(lengths), used)
    while int((lengths * lines).sum()) < count:  # rows of unequal lengths: the selected ones may be too short
        used += 1
        lines = spread(torch.ones_like(lengths), used)
    picks = spread(lengths * lines, count)
    marks = [spread(torch.ones(n, dtype=torch.int64), k) for n, k in zip(lengths.tolist(), picks.tolist(), strict=True)]
    return torch.cat(marks) > 0
