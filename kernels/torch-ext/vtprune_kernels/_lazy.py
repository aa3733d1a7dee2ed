# SPDX-License-Identifier: Apache-2.0
"""Exact lazy evaluation for greedy choices whose gains only ever fall as more rows are chosen.

A value computed a few picks ago is then an upper bound of today's. Only rows whose old value could still win are
evaluated again, in blocks, so that the products stay matrix products. The result is the same as evaluating every row
at every pick (Minoux, "Accelerated greedy algorithms", 1978).

Going further, a window of the best rows is brought up to date together, and picks are made inside the window for as
long as its best row beats the bounds of all rows outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 64


def top_set(values: Tensor, count: int) -> Tensor:
    """Ascending row numbers of the `count` largest values, ties to the smaller row."""
    count = min(count, len(values))
    if count == 1:
        return values.argmax()[None]  # argmax returns the first of equals
    largest, rows = values.topk(min(count + 1, len(values)))
    if count < len(values) and largest[count - 1] == largest[count]:
        rows = torch.sort(values, descending=True, stable=True).indices  # topk leaves the order of equals open
    return rows[:count].sort().values


def lazy_top(bounds: Tensor, seen: Tensor, step: int, count: int, refresh: Callable[[Tensor], None]) -> Tensor:
    """Ascending row numbers of the `count` largest exact values.

    Args:
        bounds: `[n]` float32 upper bounds, minus infinity for rows already chosen.
        seen: `[n]` int64: at which step each bound was computed; a bound with `seen == step` is exact.
        step: The present step.
        count: How many rows are wanted.
        refresh: Makes the bounds of the given rows exact, in place, and marks them as seen.

    Returns:
        Tensor: `[count]` int64.
    """
    width = max(_BLOCK, count)
    while True:
        rows = top_set(bounds, count)
        exact = seen == step
        if bool(exact[rows].all()):
            return rows
        likely = bounds.masked_fill(exact, -torch.inf).topk(min(width, len(bounds)))
        to_beat = bounds.masked_fill(~exact, -torch.inf).topk(count).values[-1]
        refresh(likely.indices[likely.values >= to_beat])
        width *= 2  # where nothing can be saved, the number of blocks stays logarithmic


class Window:
    """How many rows to look at together: twice as many after a window with few picks, half after one with many."""

    def __init__(self, rows: int = 96) -> None:
        self.rows = rows

    def adapt(self, picks: int) -> None:
        if picks < 8:
            self.rows = min(2 * self.rows, 128)
        elif picks > 32:
            self.rows = max(self.rows // 2, 32)
