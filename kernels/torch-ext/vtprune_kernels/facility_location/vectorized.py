# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location with lazy evaluation: gains never rise, so only rows that may be the best are evaluated."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._cosine import Cosine
from .._lazy import Window, lazy_top
from .._ragged import select_by_group
from .naive import first_best, gains, ties, usable, values

# Groups of up to 3,000 rows keep the cosines of all pairs, which the first gains need anyway.
MATRIX_BYTES = 36_000_000
_BLOCK = 256  # rows that are compared with all rows at a time


def facility_location(
    features: Tensor,
    weights: Tensor | None,
    offsets: Tensor,
    budgets: Tensor,
    max_budget: int | None = None,
    combine: Literal["product", "sum"] = "product",
) -> Tensor:
    """See `vtprune_kernels.facility_location`."""

    def of_group(start: int, stop: int, budget: int) -> Tensor:
        weight = None if weights is None else usable(weights[start:stop])
        return _Group(Cosine(features[start:stop]), weight, budget, combine).choose()

    return select_by_group(offsets, budgets, features.device, max_budget, of_group)


class _Group:
    """State of one group: the coverage of each row, and the value of each row when it was last evaluated."""

    def __init__(self, cosine: Cosine, weight: Tensor | None, budget: int, combine: Literal["product", "sum"]) -> None:
        self.cosine, self.weight, self.combine = cosine, weight, combine
        self.covered = torch.zeros(len(cosine), device=cosine.rows.device, dtype=torch.float32)
        self.tie = ties(self.covered, weight, combine)
        self.matrix: Tensor | None = None
        if 4 * len(cosine) ** 2 <= MATRIX_BYTES:
            self.matrix = self.covered.new_empty(len(cosine), len(cosine))
        self.bounds = values(self.first_gains(), weight, combine)
        self.seen = torch.zeros(len(cosine), dtype=torch.int64, device=cosine.rows.device)
        self.chosen = self.seen.new_zeros(budget)
        self.done = 0

    def first_gains(self) -> Tensor:
        """Gains `[n]` before the first pick; every pair is multiplied once."""
        total = torch.zeros_like(self.covered, dtype=torch.float64)
        for start in range(0, len(self.cosine), _BLOCK):
            stop = min(start + _BLOCK, len(self.cosine))
            block = self.cosine.between(slice(start, stop), self.cosine.subset(slice(start, None)))
            if self.matrix is not None:
                self.matrix[start:stop, start:] = block
                self.matrix[stop:, start:stop] = block[:, stop - start :].T
            total[start:stop] += gains(block, self.covered[start:])
            total[stop:] += gains(block[:, stop - start :].T, self.covered[start:stop])
        return total

    def lines(self, rows: Tensor) -> Tensor:
        """Cosines `[r, n]` of `rows` and all rows."""
        return self.cosine(rows) if self.matrix is None else self.matrix[rows]

    def update(self, rows: Tensor, gain: Tensor) -> None:
        value = values(gain, None if self.weight is None else self.weight[rows], self.combine)
        self.bounds[rows] = value.masked_fill(self.bounds[rows] == -torch.inf, -torch.inf)
        self.seen[rows] = self.done

    def refresh(self, rows: Tensor) -> None:
        for part in rows.split(_BLOCK):
            self.update(part, gains(self.lines(part), self.covered))

    def pick(self, rows: Tensor, limit: int) -> None:
        """Selects up to `limit` of `rows`, whose bounds are exact, as long as the best exceeds all bounds outside."""
        rest = float(self.bounds.index_fill(0, rows, -torch.inf).amax())
        lines, value = self.lines(rows), self.bounds[rows]
        weight, tie = None if self.weight is None else self.weight[rows], self.tie[rows]
        taken = torch.zeros_like(value)
        picked: list[int] = []
        while len(picked) < limit:
            best, least = first_best(value + taken, tie)
            if picked and not least > rest:
                break
            taken[best] = -torch.inf
            picked.append(best)
            self.covered = torch.maximum(self.covered, lines[best])
            gain = gains(lines, self.covered)
            value = values(gain, weight, self.combine)
        chosen = rows[rows.new_tensor(picked)]
        self.chosen[self.done : self.done + len(chosen)] = chosen
        self.bounds[chosen] = -torch.inf
        self.done += len(chosen)
        self.update(rows, gain)

    def choose(self) -> Tensor:
        """Selects rows `[budget]`, returned in order of selection."""
        budget, window = len(self.chosen), Window()
        while self.done < budget:
            before, width = self.done, min(window.rows, len(self.cosine) - self.done)
            self.pick(lazy_top(self.bounds, self.seen, before, width, self.refresh), min(width, budget - before))
            window.adapt(self.done - before)
        return self.chosen
