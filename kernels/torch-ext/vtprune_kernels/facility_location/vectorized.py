# SPDX-License-Identifier: Apache-2.0
"""Greedy facility location with lazy evaluation: gains never rise, so only rows that may be the best are evaluated."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._lazy import Window, lazy_top
from .._ragged import select_by_group
from .naive import copies, gains, inverse_lengths, least_tied, on_grid, usable, values

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
        return _Group(_Cosines(features[start:stop]), weight, budget, combine).choose()

    return select_by_group(offsets, budgets, features.device, max_budget, of_group)


class _Cosines:
    """Cosines of the rows of a group, from products in float64; few rows are converted at a time."""

    def __init__(self, features: Tensor) -> None:
        rows = features.float()
        self.factor = inverse_lengths(rows)
        self.rows = rows if bool((self.factor > 0).all()) else torch.where(self.factor[:, None] > 0, rows, 0.0)

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, rows: Tensor | slice, first: int = 0) -> Tensor:
        """Cosines `[r, n - first]` of `rows` and all rows from `first` on."""
        left, factor = self.rows[rows].double(), self.factor[rows]
        pieces = zip(self.rows[first:].split(_BLOCK), self.factor[first:].split(_BLOCK), strict=True)
        return torch.cat([on_grid(left @ right.double().T, factor, others) for right, others in pieces], 1)


class _Group:
    """State of one group: the coverage of each row, and the value of each row when it was last evaluated."""

    def __init__(
        self, cosine: _Cosines, weight: Tensor | None, budget: int, combine: Literal["product", "sum"]
    ) -> None:
        self.cosine, self.weight, self.combine = cosine, weight, combine
        self.covered = torch.zeros(len(cosine), device=cosine.factor.device, dtype=torch.float32)
        self.matrix: Tensor | None = None
        if 4 * len(cosine) ** 2 <= MATRIX_BYTES:
            self.matrix = self.covered.new_empty(len(cosine), len(cosine))
        self.bounds = values(self.first_gains(), weight, combine)
        self.seen = torch.zeros(len(cosine), dtype=torch.int64, device=cosine.factor.device)
        self.chosen = self.seen.new_zeros(budget)
        self.done = 0

    def first_gains(self) -> Tensor:
        """Gains `[n]` before the first pick; every pair is multiplied once."""
        total = torch.zeros_like(self.covered, dtype=torch.float64)
        for start in range(0, len(self.cosine), _BLOCK):
            stop = min(start + _BLOCK, len(self.cosine))
            block = self.cosine(slice(start, stop), start)
            if self.matrix is not None:
                self.matrix[start:stop, start:] = block
                self.matrix[stop:, start:stop] = block[:, stop - start :].T
            total[start:stop] += gains(block, self.covered[start:])
            total[stop:] += gains(block[:, stop - start :].T, self.covered[start:stop])
        return total

    def lines(self, rows: Tensor) -> Tensor:
        """Cosines `[r, n]` of `rows` and all rows."""
        return self.cosine(rows) if self.matrix is None else self.matrix[rows]

    def update(self, rows: Tensor, value: Tensor) -> None:
        self.bounds[rows] = value.masked_fill(self.bounds[rows] == -torch.inf, -torch.inf)
        self.seen[rows] = self.done

    def evaluate(self, rows: Tensor, lines: Tensor) -> Tensor:
        """Values `[r]` of `rows`, from their cosines `[r, n]` to all rows."""
        return values(gains(lines, self.covered), None if self.weight is None else self.weight[rows], self.combine)

    def refresh(self, rows: Tensor) -> None:
        for part in rows.split(_BLOCK):
            self.update(part, self.evaluate(part, self.lines(part)))

    def tied(self, others: Tensor, least: float) -> Tensor:
        """Those of the rows `others` that are free and have a value of at least `least`."""
        others = others[self.bounds[others] > -torch.inf]
        return others[self.evaluate(others, self.lines(others)) >= least]

    def pick(self, rows: Tensor, limit: int) -> None:
        """Selects up to `limit` of `rows`, whose bounds are exact, as long as the best exceeds all bounds outside.

        A copy of the best row may be selected in its stead, also from outside.
        """
        rest = float(self.bounds.index_fill(0, rows, -torch.inf).amax())
        lines, value, first = self.lines(rows), self.bounds[rows], self.done
        is_copy = copies(lines)  # [r, n]
        has_copies = (is_copy.sum(1) > 1).tolist()
        while self.done - first < limit:
            best = int(value.argmax())
            weight = 1.0 if self.weight is None else float(self.weight[rows[best]])
            any_row, a_copy = least_tied(float(value[best]), weight, len(self.cosine), self.combine)
            if self.done > first and not any_row > rest:
                break
            chosen = rows[(value >= any_row).to(torch.int8).argmax()]  # argmax returns the first of equals
            if has_copies[best]:
                chosen = torch.cat([chosen[None], self.tied(is_copy[best].nonzero()[:, 0], a_copy)]).amin()
            self.chosen[self.done] = chosen
            self.bounds[chosen] = -torch.inf
            self.done += 1
            self.covered = torch.maximum(self.covered, self.lines(chosen[None])[0])
            value = self.evaluate(rows, lines).masked_fill_(self.bounds[rows] == -torch.inf, -torch.inf)
        self.update(rows, value)

    def choose(self) -> Tensor:
        """Selects rows `[budget]`, returned in order of selection."""
        budget, window = len(self.chosen), Window()
        while self.done < budget:
            before, width = self.done, min(window.rows, len(self.cosine) - self.done)
            self.pick(lazy_top(self.bounds, self.seen, before, width, self.refresh), min(width, budget - before))
            window.adapt(self.done - before)
        return self.chosen
