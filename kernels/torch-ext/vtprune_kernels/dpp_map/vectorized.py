# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a conditional DPP with lazy evaluation and `O(N K)` memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosine import Cosine
from .._lazy import Window, lazy_top
from .._ragged import finite, select_by_group
from .._small import is_small
from . import gram
from .naive import EXHAUSTED


def dpp_map(
    features: Tensor, relevance: Tensor, offsets: Tensor, budgets: Tensor, max_budget: int | None = None
) -> Tensor:
    """See `vtprune_kernels.dpp_map`."""
    rank = features.shape[1]

    def of_group(start: int, stop: int, budget: int) -> Tensor:
        kernel = Cosine(features[start:stop], relevance[start:stop].float())
        # Near the rank of the rows, gains are only rounding, which differs between the two paths.
        small = budget < rank // 2 and is_small(stop - start, rank, budget)
        return (gram.choose if small else choose)(kernel, budget, rank)

    return select_by_group(offsets, budgets, features.device, max_budget, of_group)


def choose(kernel: Cosine, budget: int, rank: int, sure: Tensor | None = None) -> Tensor:
    """Same as `gram.choose`, with lazy evaluation."""
    return _Group(kernel, budget, sure).choose(rank)


class _Group:
    """The factor `C` `[K, n]` of one group (`kernel[chosen] = L C`), each column known up to `seen` rows."""

    def __init__(self, kernel: Cosine, budget: int, sure: Tensor | None) -> None:
        self.kernel, self.sure = kernel, sure
        self.exhausted = EXHAUSTED if sure is None else 0.0
        self.variance = finite(kernel.squares)
        self.left = self.variance.clone()
        self.bounds = self.gains(self.left, self.variance)
        self.factors = self.left.new_zeros(budget, len(kernel))
        self.triangle = self.left.new_zeros(budget, budget)  # L, the factor's columns of the selected rows
        self.seen = torch.zeros_like(self.left, dtype=torch.int64)
        self.chosen = self.seen.new_zeros(budget)
        self.done = 0

    def gains(self, left: Tensor, variance: Tensor) -> Tensor:
        return torch.where(left > self.exhausted * variance, left, 0)

    def update(self, rows: Tensor, left: Tensor) -> None:
        self.left[rows] = left
        self.bounds[rows] = torch.minimum(self.bounds[rows], self.gains(left, self.variance[rows]))
        self.seen[rows] = self.done

    def refresh(self, rows: Tensor) -> None:
        since, done = int(self.seen[rows].min()), self.done
        new = self.kernel.between(self.chosen[since:done], self.kernel.subset(rows))  # [done - since, r]
        if since:
            new -= self.triangle[since:done, :since] @ self.factors[:since, rows]
        new = torch.linalg.solve_triangular(self.triangle[since:done, since:done], new, upper=False)
        self.factors[since:done, rows] = new
        unseen = torch.arange(since, done, device=rows.device)[:, None] >= self.seen[rows]
        self.update(rows, self.left[rows] - (new.square_() * unseen).sum(0))

    def pick(self, rows: Tensor, limit: int) -> None:
        """Selects up to `limit` of `rows`, whose bounds are exact, as long as the best exceeds all bounds outside."""
        rest = float(self.bounds.index_fill(0, rows, -torch.inf).amax())
        done, known = self.done, self.factors[: self.done, rows]
        kernel = self.kernel.subset(rows)(slice(None)).sub_(known.T @ known)  # [w, w] given the selected rows
        left, variance = self.left[rows], self.variance[rows]
        new = left.new_zeros(limit, len(rows))
        taken = torch.zeros_like(left)
        picked: list[int] = []
        while len(picked) < limit:
            value = self.gains(left, variance) + taken
            best = int(value.argmax())
            least = 0.0 if self.sure is None else float(self.sure[rows[best]])
            if float(value[best]) <= max(least, rest if picked else 0.0):
                break
            step = len(picked)
            new[step] = (kernel[best] - new[:step, best] @ new[:step]) / left[best].sqrt()
            left = left - new[step].square()
            taken[best] = -torch.inf
            picked.append(best)
        count, chosen = len(picked), rows.new_tensor(picked)
        self.factors[done : done + count, rows] = new[:count]
        self.triangle[done : done + count, :done] = known[:, chosen].T
        self.triangle[done : done + count, done : done + count] = new[:count, chosen].T.tril()
        self.chosen[done : done + count] = rows[chosen]
        self.bounds[rows[chosen]] = -torch.inf
        self.done += count
        self.update(rows, left)

    def choose(self, rank: int) -> Tensor:
        budget, window = len(self.chosen), Window()
        while self.done < budget:
            before, width = self.done, min(window.rows, len(self.kernel) - self.done)
            if before < rank:
                rows = lazy_top(self.bounds, self.seen, before, width, self.refresh)
                self.pick(rows, min(width, budget - before, rank - before))
            if self.done == before:  # the selected rows explain all others
                if self.sure is not None:
                    return self.chosen[:before]
                rest = self.variance.masked_fill(self.bounds == -torch.inf, -torch.inf)
                best_first = torch.sort(rest, descending=True, stable=True).indices
                self.chosen[before:] = best_first[: budget - before]
                break
            window.adapt(self.done - before)
        return self.chosen
