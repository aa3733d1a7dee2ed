# SPDX-License-Identifier: Apache-2.0
"""Exact lazy evaluation for greedy selection whose gains never rise as more rows are selected.

A value computed some picks ago is then an upper bound of the current one. Only rows whose bound is large enough to win
are evaluated again, in blocks, as matrix products. The result is the same as evaluating every row at every pick
(Minoux, "Accelerated greedy algorithms", 1978).

In addition, a window of the best rows is updated together, and picks are made inside the window as long as its best row
exceeds the bounds of all rows outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 64


def top_set(values: Tensor, count: int) -> Tensor:
    """Ascending row numbers of the `count` largest values; ties go to the smaller row."""
    count = min(count, len(values))
    if count == 1:
        return values.argmax()[None]  # argmax returns the first of equals
    largest, rows = values.topk(min(count + 1, len(values)))
    if count < len(values) and largest[count - 1] == largest[count]:
        rows = torch.sort(values, descending=True, stable=True).indices  # topk does not define the order of equals
    return rows[:count].sort().values


def lazy_top(bounds: Tensor, seen: Tensor, step: int, count: int, refresh: Callable[[Tensor], None]) -> Tensor:
    """Ascending row numbers of the `count` largest exact values.

    Args:
        bounds: `[n]` float32 upper bounds, minus infinity for rows already selected.
        seen: `[n]` int64 step at which each bound was computed; a bound with `seen == step` is exact.
        step: The current step.
        count: Number of rows.
        refresh: Makes the bounds of the given rows exact, in place, and updates `seen`.

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
        width *= 2  # so that the number of blocks stays logarithmic if most rows have to be evaluated


class Window:
    """Number of rows to evaluate together, doubled after a window with few picks and halved after one with many."""

    def __init__(self, rows: int = 96) -> None:
        self.rows = rows

    def adapt(self, picks: int) -> None:
        if picks < 8:
            self.rows = min(2 * self.rows, 128)
        elif picks > 32:
            self.rows = max(self.rows // 2, 32)
