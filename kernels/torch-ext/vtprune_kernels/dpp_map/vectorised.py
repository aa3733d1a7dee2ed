# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional DPP with `O(N K)` memory: rows of the Cholesky factor only where they can still win."""

from __future__ import annotations

import torch
from torch import Tensor

from .._lazy import lazy_top
from .._ragged import empty_order, finite, pools, unit_rows
from .naive import EXHAUSTED


def dpp_map(features: Tensor, relevance: Tensor, segments: Tensor, budgets: Tensor) -> Tensor:
    """See `vtprune_kernels.dpp_map`."""
    order = empty_order(budgets, features.device)
    for number, (start, stop, budget) in enumerate(pools(segments, budgets)):
        if budget > 0:
            state = _Pool(unit_rows(features[start:stop]), relevance[start:stop].float(), budget)
            order[number, :budget] = state.choose() + start
    return order


class _Pool:
    """The factor `C` `[K, n]` of one pool (`kernel[chosen] = L C`), each column known up to `seen` rows."""

    def __init__(self, unit: Tensor, relevance: Tensor, budget: int) -> None:
        self.rows = torch.nan_to_num(unit * relevance[:, None], nan=0.0, posinf=0.0, neginf=0.0)
        self.variance = finite(self.rows.square().sum(1))
        self.left = self.variance.clone()
        self.bounds = self.gains(slice(None))
        self.factors = unit.new_zeros(budget, len(unit))
        self.triangle = unit.new_zeros(budget, budget)  # L, the factor's columns of the chosen rows
        self.seen = torch.zeros(len(unit), dtype=torch.int64, device=unit.device)
        self.chosen = torch.empty(budget, dtype=torch.int64, device=unit.device)
        self.done = 0

    def gains(self, rows: Tensor | slice) -> Tensor:
        return torch.where(self.left[rows] > EXHAUSTED * self.variance[rows], self.left[rows], 0)

    def refresh(self, rows: Tensor) -> None:
        since, done = int(self.seen[rows].min()), self.done
        new = self.rows[self.chosen[since:done]] @ self.rows[rows].T  # [done - since, r]
        new -= self.triangle[since:done, :since] @ self.factors[:since, rows]
        new = torch.linalg.solve_triangular(self.triangle[since:done, since:done], new, upper=False)
        self.factors[since:done, rows] = new
        unseen = torch.arange(since, done, device=rows.device)[:, None] >= self.seen[rows]
        self.left[rows] -= (new.square() * unseen).sum(0)
        self.bounds[rows] = torch.minimum(self.bounds[rows], self.gains(rows))
        self.seen[rows] = done

    def choose(self) -> Tensor:
        budget = len(self.chosen)
        while self.done < budget:
            row = lazy_top(self.bounds, self.seen, self.done, 1, self.refresh)
            if bool(self.bounds[row] <= 0):  # nothing is left that the chosen rows do not explain
                rest = self.variance.masked_fill(self.bounds == -torch.inf, -torch.inf)
                best_first = torch.sort(rest, descending=True, stable=True).indices
                self.chosen[self.done :] = best_first[: budget - self.done]
                break
            self.triangle[self.done, : self.done] = self.factors[: self.done, row].squeeze(1)
            self.triangle[self.done, self.done] = self.left[row].sqrt()
            self.chosen[self.done] = row
            self.bounds[row] = -torch.inf
            self.done += 1
        return self.chosen
